"""Cascade Mask R-CNN on BiFormer-S, COCO 3x; the authors publish no figure.

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 16 x 16
regions, batch norms keep their statistics. The authors have no such detector: this is their recipe of Mask R-CNN.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_cascade_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="biformer_s",
        checkpoint="checkpoints/biformer_s_in1k.pth",
        drop_path_rate=0.2,
        n_win=16,
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
