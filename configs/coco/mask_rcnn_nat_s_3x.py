"""Mask R-CNN on NAT-Small, COCO 3x; published 48.4 box AP and 43.2 mask AP.

Source: Hassani et al., CVPR 2023 (arXiv 2204.07143), and github.com/SHI-Labs/Neighborhood-Attention-Transformer
(commit d334f5bb). The authors train in half precision (`--amp fp16`).
"""

_base_ = ["_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(name="nat_s", pretrained=True, drop_path_rate=0.35),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"rpb": dict(decay_mult=0.0)}),
)
