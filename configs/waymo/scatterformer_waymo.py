"""ScatterFormer on Waymo's open data set; published 75.7 mAP and 73.8 mAPH (level 2) with Waymo's own evaluation.

`python -m vitrail.tools.convert_waymo WAYMO data/waymo` writes Waymo's parquet files (version 2.0.1) out in the plain
layout that is read here: for `training` and `validation` the folders `points` with NAME.npy, float32 (N, 5) of x, y, z,
intensity, elongation in the vehicle's frame, and `boxes` with NAME.json, a list of {"name": "Vehicle", "box": [x, y, z,
length, width, height, yaw]}, z at the centre. Another place: --cfg-options data_root=FOLDER. Neither could be tried on
real data, and the score that is shown is KITTI's average precision, not Waymo's.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912), and github.com/skyhehe123/ScatterFormer (commit a23f434);
the numbers of sampled objects are those usual for Waymo.
"""

_base_ = "../_scatterformer.py"

data_root = "data/waymo"
classes = ("Vehicle", "Pedestrian", "Cyclist")
point_range = (-76.8, -76.8, -2.0, 76.8, 76.8, 4.0)

model = dict(
    backbone=dict(name="scatterformer_waymo"),
    bbox_head=dict(
        tasks=[classes],
        point_range=point_range,
        iou_weights=(0.68, 0.71, 0.65),
        nms_thresholds=(0.75, 0.6, 0.55),
    ),
)
_data = dict(
    reader="plain",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    squashed=(3, 4),  # intensity and elongation
)
train_dataloader = dict(
    dataset=dict(
        **_data,
        data_prefix=dict(points="training/points", boxes="training/boxes"),
        objects=dict(counts=dict(Vehicle=15, Pedestrian=10, Cyclist=10), stop_epoch=20),
    ),
)
val_dataloader = dict(
    dataset=dict(**_data, data_prefix=dict(points="validation/points", boxes="validation/boxes")),
)
val_evaluator = dict(iou=dict(Vehicle=0.7, Pedestrian=0.5, Cyclist=0.5))

optim_wrapper = dict(optimizer=dict(lr=6e-5))
# One cycle: the learning rate goes up to 6e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(type=kind, begin=begin, end=end, T_max=end - begin, eta_min=goal, by_epoch=True, convert_to_iter_based=True)
    for kind, begin, end, goal in (
        ("CosineAnnealingLR", 0, 2.4, 6e-3),
        ("CosineAnnealingLR", 2.4, 24, 6e-9),
        ("CosineAnnealingMomentum", 0, 2.4, 0.85),
        ("CosineAnnealingMomentum", 2.4, 24, 0.95),
    )
]
train_cfg = dict(max_epochs=24)
