"""ScatterFormer on Waymo's open data set; published 75.7 mAP and 73.8 mAPH (level 2) with Waymo's own evaluation.

The data must be written out in a plain layout first, for which there is no tool here: `data_root` holds for `training`
and `validation` the folders `points` with NAME.npy, float32 (N, 5) of x, y, z, intensity, elongation in the vehicle's
frame, and `boxes` with NAME.json, a list of {"name": "Vehicle", "box": [x, y, z, length, width, height, yaw]}, z at the
centre. Another place: --cfg-options data_root=FOLDER. It could not be tried on real data, and the score that it shows
is KITTI's average precision, not Waymo's.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912), and github.com/skyhehe123/ScatterFormer (commit a23f434);
the numbers of sampled objects are those usual for Waymo.
"""

default_scope = "mmengine"
data_root = "data/waymo"
classes = ("Vehicle", "Pedestrian", "Cyclist")
point_range = (-76.8, -76.8, -2.0, 76.8, 76.8, 4.0)
max_epochs = 24

model = dict(
    type="PointDetector",
    backbone=dict(type="PointBackbone", name="scatterformer_waymo"),
    neck=dict(type="CascadedBevBackbone", dim=128),
    bbox_head=dict(
        type="CenterHead",
        in_channels=128,
        tasks=[classes],
        point_range=point_range,
        iou_weights=(0.68, 0.71, 0.65),
        nms_thresholds=(0.75, 0.6, 0.55),
        loss_weights=dict(box=2.0),
    ),
)

data = dict(type="PointDataset", reader="plain", data_root=data_root, classes=classes, point_range=point_range)
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="ShuffledSampler"),
    batch_sampler=dict(type="WholeStepBatchSampler"),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(
        **data,
        data_prefix=dict(points="training/points", boxes="training/boxes"),
        training=True,
        scene=dict(flips=("x", "y"), rotation=0.7854, scaling=(0.95, 1.05), translation=0.5),
        objects=dict(counts=dict(Vehicle=15, Pedestrian=10, Cyclist=10), min_points=5, stop_epoch=20),
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(**data, data_prefix=dict(points="validation/points", boxes="validation/boxes")),
)
val_evaluator = dict(type="PointAveragePrecision", iou=dict(Vehicle=0.7, Pedestrian=0.5, Cyclist=0.5))

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.95, 0.99), weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
# One cycle: the learning rate goes up to 6e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        T_max=2.4,
        eta_min=6e-3,
        begin=0,
        end=2.4,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=21.6,
        eta_min=6e-9,
        begin=2.4,
        end=24,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum",
        T_max=2.4,
        eta_min=0.85,
        begin=0,
        end=2.4,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum",
        T_max=21.6,
        eta_min=0.95,
        begin=2.4,
        end=24,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type="ValLoop")
default_hooks = dict(logger=dict(type="LoggerHook", interval=50), checkpoint=dict(type="CheckpointHook", interval=1))
