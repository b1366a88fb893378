"""Cascade Mask R-CNN on DaViT-T, COCO 1x; the authors publish no figure.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' configs, which are those of DaViT-T. The authors have no such detector: this is their recipe of Mask
R-CNN.
"""

_base_ = ["_cascade_mask_rcnn.py", "_1x_multiscale.py"]

model = dict(
    backbone=dict(
        name="davit_t",
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
