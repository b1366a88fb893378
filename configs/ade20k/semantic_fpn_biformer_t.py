"""Semantic FPN on BiFormer-T, ADE20K; the authors publish no figure.

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 8 x 8 regions,
statistics of all processes in the batch norms. The drop path is our choice. The rest is in `_semantic_fpn.py`.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = "_semantic_fpn.py"

model = dict(
    backbone=dict(name="biformer_t", checkpoint="checkpoints/biformer_t_in1k.pth", drop_path_rate=0.1, n_win=8),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

sync_bn = "torch"
