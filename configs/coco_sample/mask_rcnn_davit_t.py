"""Mask R-CNN on DaViT-T, a handful of COCO images: shows that a detector learns, by learning them by heart.

`data_root` holds `images/train/*.jpg` and `annotations/instances_train.json` (COCO format, the 80 classes of COCO).
Another place: --cfg-options data_root=FOLDER. Held out is nothing: the score is that of the training images.

Source of the recipe: our own. Starts from random weights, so the pyramid and the mask head have group norms. Nothing is
augmented. A tenth of the objects is smaller than 16 x 16 pixels even at this size: two sizes of anchors a level, the
smallest 12 x 12, leave 1.5 % of the objects without an anchor of IoU 0.3 or more (13 % with mmdetection's anchors).
"""

_base_ = "../coco/_mask_rcnn.py"

data_root = "data/coco_sample"

model = dict(
    backbone=dict(name="davit_t"),
    neck=dict(in_channels=[96, 192, 384, 768], norm_cfg=dict(type="GN", num_groups=32)),
    rpn_head=dict(anchor_generator=dict(scales=[3, 6])),
    roi_head=dict(mask_head=dict(norm_cfg=dict(type="GN", num_groups=32))),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(800, 600), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(800, 600), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_train.json")
test_evaluator = val_evaluator

auto_scale_lr = dict(enable=True, base_batch_size=8)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=1800, eta_min=1e-6, by_epoch=False, begin=200, end=2000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, save_best="coco/bbox_mAP"),
)
log_processor = dict(by_epoch=False)
