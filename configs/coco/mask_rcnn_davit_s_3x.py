"""Mask R-CNN on DaViT-S, COCO 3x; published 49.5 box AP and 44.3 mask AP.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' configs, which are those of DaViT-T.
"""

_base_ = ["_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="davit_s",
        pretrained=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
