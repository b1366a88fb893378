"""Semantic FPN on DaViT-B, ADE20K; the authors publish no figure.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). The authors have
no such segmenter: recipe and drop path are our choice. The rest is in `_semantic_fpn.py`.
"""

_base_ = "_semantic_fpn.py"

model = dict(
    backbone=dict(name="davit_b", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
