"""Mask R-CNN on DaViT-B, COCO 3x; published 49.9 box AP and 44.6 mask AP.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' configs, which are those of DaViT-T.
"""

_base_ = ["_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="davit_b",
        pretrained=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
