"""ScatterFormer on KITTI's 3D objects: cars, pedestrians, cyclists.

`data_root` holds `training/{velodyne/*.bin,label_2/*.txt,calib/*.txt}` and `ImageSets/{train,val}.txt`, a scan's number
a line, as KITTI and the usual split have it. Another place: --cfg-options data_root=FOLDER. Images are not read.

Source of the recipe: our own, for the authors of ScatterFormer have none for KITTI: theirs for Waymo, with KITTI's
range, its classes, the numbers of sampled objects of SECOND (Yan et al., Sensors 2018), half the learning rate, and a
stricter suppression of doubles.
"""

_base_ = "../_scatterformer.py"

data_root = "data/kitti"
classes = ("Car", "Pedestrian", "Cyclist")
point_range = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)

model = dict(
    backbone=dict(name="scatterformer_kitti"),
    bbox_head=dict(tasks=[classes], point_range=point_range, iou_weights=(0.68, 0.71, 0.65)),
)
_data = dict(
    reader="kitti",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    data_prefix=dict(points="training/velodyne", labels="training/label_2", calib="training/calib"),
    neighbours=dict(Van="Car", Person_sitting="Pedestrian"),
)
train_dataloader = dict(
    num_workers=4,
    dataset=dict(
        **_data,
        ann_file="ImageSets/train.txt",
        scene=dict(flips=("x",)),
        objects=dict(counts=dict(Car=15, Pedestrian=10, Cyclist=10), stop_epoch=76),
    ),
)
val_dataloader = dict(num_workers=4, dataset=dict(**_data, ann_file="ImageSets/val.txt"))
val_evaluator = dict(iou=0.5, by_difficulty=True)

optim_wrapper = dict(optimizer=dict(lr=3e-5))
# One cycle: the learning rate goes up to 3e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(type=kind, begin=begin, end=end, T_max=end - begin, eta_min=goal, by_epoch=True, convert_to_iter_based=True)
    for kind, begin, end, goal in (
        ("CosineAnnealingLR", 0, 8, 3e-3),
        ("CosineAnnealingLR", 8, 80, 3e-9),
        ("CosineAnnealingMomentum", 0, 8, 0.85),
        ("CosineAnnealingMomentum", 8, 80, 0.95),
    )
]
train_cfg = dict(max_epochs=80, val_interval=5)
