"""ScatterFormer on nuScenes: ten classes, ten sweeps.

`data_root` holds `v1.0-trainval/*.json`, `samples`, `sweeps`, and `splits/{train,val}.txt`, a scene's name a line (the
data set's development kit has them: nuscenes.utils.splits). Another place: --cfg-options data_root=FOLDER.

Source of the recipe: He et al., ECCV 2024 (arXiv 2401.00912), and github.com/skyhehe123/ScatterFormer (commit a23f434),
with a CenterHead in place of their TransFusion head: grouped classes, velocities and sampled objects as in CenterPoint
(Yin et al., CVPR 2021). Their 68.3 mAP is with the other head and cannot be expected here.
"""

_base_ = "../_scatterformer.py"

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

model = dict(
    backbone=dict(name="scatterformer_nuscenes"),
    bbox_head=dict(
        tasks=[classes[:1], classes[1:3], classes[3:5], classes[5:6], classes[6:8], classes[8:]],
        point_range=point_range,
        with_velocity=True,
        iou_weights=(0.5,) * 10,
        loss_weights=dict(box=0.25, velocity=0.2),
    ),
)
_data = dict(
    reader="nuscenes",
    data_root=data_root,
    classes=classes,
    point_range=point_range,
    version="v1.0-trainval",
    sweeps=10,
)
train_dataloader = dict(
    dataset=dict(
        **_data,
        ann_file="splits/train.txt",
        scene=dict(scaling=(0.9, 1.1)),
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
            stop_epoch=17,
        ),
    ),
)
val_dataloader = dict(dataset=dict(**_data, ann_file="splits/val.txt"))
val_evaluator = dict(iou=0.5)

optim_wrapper = dict(optimizer=dict(lr=6e-4, weight_decay=0.03))
# One cycle: the learning rate goes up to 6e-3 and down again, the momentum from 0.95 to 0.85 and back.
param_scheduler = [
    dict(type=kind, begin=begin, end=end, T_max=end - begin, eta_min=goal, by_epoch=True, convert_to_iter_based=True)
    for kind, begin, end, goal in (
        ("CosineAnnealingLR", 0, 8, 6e-3),
        ("CosineAnnealingLR", 8, 20, 6e-8),
        ("CosineAnnealingMomentum", 0, 8, 0.85),
        ("CosineAnnealingMomentum", 8, 20, 0.95),
    )
]
train_cfg = dict(max_epochs=20)
