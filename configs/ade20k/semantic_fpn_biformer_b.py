"""Semantic FPN on BiFormer-B, ADE20K; published mIoU 49.9 %.

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 8 x 8 regions,
statistics of all processes in the batch norms. The rest is in `_semantic_fpn.py`.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = "_semantic_fpn.py"

model = dict(
    backbone=dict(name="biformer_b", checkpoint="checkpoints/biformer_b_in1k.pth", drop_path_rate=0.3, n_win=8),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

sync_bn = "torch"
