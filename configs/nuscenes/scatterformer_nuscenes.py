"""ScatterFormer on nuScenes: ten classes, ten sweeps.

`data_root` holds `v1.0-trainval/*.json`, `samples`, `sweeps`, and `splits/{train,val}.txt`, a scene's name a line (the
data set's development kit has them: nuscenes.utils.splits). Another place: --cfg-options data_root=FOLDER.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912), and github.com/skyhehe123/ScatterFormer (commit a23f434),
with a CenterHead in place of their TransFusion head: grouped classes, velocities and sampled objects as in CenterPoint
(Yin et al., CVPR 2021). Their 68.3 mAP is with the other head and cannot be expected here.
"""

default_scope = "mmengine"
data_root = "data/nuscenes"
classes = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
point_range = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
max_epochs = 20

model = dict(
    type="PointDetector",
    backbone=dict(type="PointBackbone", name="scatterformer_nuscenes"),
    neck=dict(type="CascadedBevBackbone", dim=128),
    bbox_head=dict(
        type="CenterHead",
        in_channels=128,
        tasks=[classes[:1], classes[1:3], classes[3:5], classes[5:6], classes[6:8], classes[8:]],
        point_range=point_range,
        with_velocity=True,
        iou_weights=(0.5,) * 10,
        nms_thresholds=0.2,
        loss_weights=dict(box=0.25, velocity=0.2),
    ),
)

data = dict(
    type="PointDataset",
    reader="nuscenes",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    version="v1.0-trainval",
    sweeps=10,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="ShuffledSampler"),
    batch_sampler=dict(type="WholeStepBatchSampler"),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(
        **data,
        ann_file="splits/train.txt",
        training=True,
        scene=dict(flips=("x", "y"), rotation=0.7854, scaling=(0.9, 1.1), translation=0.5),
        objects=dict(
            counts=dict(
                car=2,
                truck=3,
                construction_vehicle=7,
                bus=4,
                trailer=6,
                barrier=2,
                motorcycle=6,
                bicycle=6,
                pedestrian=2,
                traffic_cone=2,
            ),
            min_points=5,
            stop_epoch=17,
        ),
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(**data, ann_file="splits/val.txt"),
)
val_evaluator = dict(type="PointAveragePrecision", iou=0.5)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-4, betas=(0.95, 0.99), weight_decay=0.03),
    clip_grad=dict(max_norm=10.0),
)
# One cycle: the learning rate goes up to 6e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        T_max=8,
        eta_min=6e-3,
        begin=0,
        end=8,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=12,
        eta_min=6e-8,
        begin=8,
        end=20,
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
        T_max=12,
        eta_min=0.95,
        begin=8,
        end=20,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type="ValLoop")
default_hooks = dict(logger=dict(type="LoggerHook", interval=50), checkpoint=dict(type="CheckpointHook", interval=1))
