"""A small ScatterFormer that learns four scans of KITTI by heart: shows in minutes that all parts work together.

`data_root` holds `velodyne_reduced/*.bin`, `label_2/*.txt` and `calib/*.txt`. It is trained and measured on the same
scans, without augmentation, so its score says nothing about other scans. Another place: --cfg-options data_root=FOLDER.

Source of the recipe: our own.
"""

_base_ = "../_scatterformer.py"

data_root = "data/kitti"
classes = ("Car", "Pedestrian", "Cyclist")
point_range = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)

model = dict(
    backbone=dict(name="scatterformer_kitti_n"),
    neck=dict(dim=64, depth=1),
    bbox_head=dict(in_channels=64, tasks=[classes], point_range=point_range, iou_weights=(0.68, 0.71, 0.65)),
)
_data = dict(
    reader="kitti",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    data_prefix=dict(points="velodyne_reduced", labels="label_2", calib="calib"),
    neighbours=dict(Van="Car", Person_sitting="Pedestrian"),
)
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(**_data, scene=None, objects=None, repeat=20))
val_dataloader = dict(batch_size=2, num_workers=1, dataset=_data)
val_evaluator = dict(iou=0.5)

optim_wrapper = dict(optimizer=dict(lr=3e-5, weight_decay=0.01))
param_scheduler = [
    dict(type=kind, begin=begin, end=end, T_max=end - begin, eta_min=goal, by_epoch=True, convert_to_iter_based=True)
    for kind, begin, end, goal in (("CosineAnnealingLR", 0, 4, 3e-3), ("CosineAnnealingLR", 4, 40, 3e-9))
]
train_cfg = dict(max_epochs=40, val_interval=5)
default_hooks = dict(checkpoint=dict(save_best="bev_Car"))
