"""A small ScatterFormer that learns four scans of KITTI by heart: shows in minutes that all parts work together.

`data_root` holds `velodyne_reduced/*.bin`, `label_2/*.txt` and `calib/*.txt`. It is trained and measured on the same
scans, without augmentation, so its score says nothing about other scans. Another place: --cfg-options data_root=FOLDER.

Source of the recipe: our own.
"""

_base_ = "_scatterformer.py"

max_epochs = 40
_folders = dict(points="velodyne_reduced", labels="label_2", calib="calib")
model = dict(
    backbone=dict(name="scatterformer_kitti_n"),
    neck=dict(dim=64, depth=1),
    bbox_head=dict(in_channels=64),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    dataset=dict(ann_file=None, data_prefix=_folders, scene=None, objects=None, repeat=20),
)
val_dataloader = dict(batch_size=2, num_workers=1, dataset=dict(ann_file=None, data_prefix=_folders))
val_evaluator = dict(by_difficulty=False)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        T_max=4,
        eta_min=3e-3,
        begin=0,
        end=4,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=36,
        eta_min=3e-9,
        begin=4,
        end=40,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(weight_decay=0.01))
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(checkpoint=dict(save_best="bev_Car"))
