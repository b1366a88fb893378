"""What the configs for KITTI share: data, recipe and head, without the backbone's name.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912), whose authors have none for KITTI: their recipe for
Waymo, with KITTI's range, its classes, the numbers of sampled objects of SECOND (Yan et al., Sensors 2018), half the
learning rate, and a stricter suppression of doubles.
"""

default_scope = "mmengine"
data_root = "data/kitti"
classes = ("Car", "Pedestrian", "Cyclist")
point_range = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
max_epochs = 80

model = dict(
    type="PointDetector",
    backbone=dict(type="PointBackbone"),
    neck=dict(type="CascadedBevBackbone", dim=128),
    bbox_head=dict(
        type="CenterHead",
        in_channels=128,
        tasks=[classes],
        point_range=point_range,
        iou_weights=(0.68, 0.71, 0.65),
        nms_thresholds=0.2,
        loss_weights=dict(box=2.0),
    ),
)

data = dict(
    type="PointDataset",
    reader="kitti",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    data_prefix=dict(points="training/velodyne", labels="training/label_2", calib="training/calib"),
    neighbours=dict(Van="Car", Person_sitting="Pedestrian"),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type="ShuffledSampler"),
    batch_sampler=dict(type="WholeStepBatchSampler"),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(
        **data,
        ann_file="ImageSets/train.txt",
        training=True,
        scene=dict(flips=("x",), rotation=0.7854, scaling=(0.95, 1.05), translation=0.5),
        objects=dict(counts=dict(Car=15, Pedestrian=10, Cyclist=10), min_points=5, stop_epoch=76),
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(**data, ann_file="ImageSets/val.txt"),
)
val_evaluator = dict(type="PointAveragePrecision", iou=0.5, by_difficulty=True)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-5, betas=(0.95, 0.99), weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
# One cycle: the learning rate goes up to 3e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        T_max=8,
        eta_min=3e-3,
        begin=0,
        end=8,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=72,
        eta_min=3e-9,
        begin=8,
        end=80,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum",
        T_max=8,
        eta_min=0.85,
        begin=0,
        end=8,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum",
        T_max=72,
        eta_min=0.95,
        begin=8,
        end=80,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
default_hooks = dict(logger=dict(type="LoggerHook", interval=50), checkpoint=dict(type="CheckpointHook", interval=1))
