"""RetinaNet on L2ViT-Small, COCO 1x; the authors publish no figure with their code.

Source: Zheng, 2025 (arXiv 2501.16182), and the configs of github.com/ChuanyangZheng/L2ViT (commit 52f008c9). Norms
are decayed like all weights.
"""

_base_ = ["_retinanet.py", "_1x_multiscale.py"]

model = dict(
    backbone=dict(name="l2vit_s", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
