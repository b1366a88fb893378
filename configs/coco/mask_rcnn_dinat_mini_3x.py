"""Mask R-CNN on DiNAT-Mini, COCO 3x; published 47.2 box AP and 42.5 mask AP.

Source: Hassani and Shi, 2022 (arXiv 2209.15001), and github.com/SHI-Labs/Neighborhood-Attention-Transformer (commit
d334f5bb). Dilations are those of the authors' detectors. The authors train in half precision (`--amp fp16`).
"""

_base_ = ["_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="dinat_mini",
        pretrained=True,
        drop_path_rate=0.2,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"rpb": dict(decay_mult=0.0)}),
)
