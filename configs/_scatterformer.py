"""What the detectors of objects in LiDAR scans share: parts of the model, loaders, optimiser, loops.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912). What differs from data set to data set stands in its
configs: ranges, classes, augmentation's numbers, and the schedule with its learning rates.
"""

default_scope = "mmengine"

model = dict(
    type="PointDetector",
    backbone=dict(type="PointBackbone"),
    neck=dict(type="CascadedBevBackbone", dim=128),
    bbox_head=dict(type="CenterHead", in_channels=128, nms_thresholds=0.2, loss_weights=dict(box=2.0)),
)

train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="ShuffledSampler"),
    batch_sampler=dict(type="WholeStepBatchSampler"),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(
        type="PointDataset",
        training=True,
        scene=dict(flips=("x", "y"), rotation=0.7854, scaling=(0.95, 1.05), translation=0.5),
        objects=dict(min_points=5),
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_scans"),
    dataset=dict(type="PointDataset"),
)
val_evaluator = dict(type="PointAveragePrecision")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", betas=(0.95, 0.99), weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
train_cfg = dict(by_epoch=True, val_interval=4)
val_cfg = dict(type="ValLoop")
default_hooks = dict(logger=dict(type="LoggerHook", interval=50), checkpoint=dict(type="CheckpointHook", interval=1))
