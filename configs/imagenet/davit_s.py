"""DaViT-S on ImageNet-1k; published 84.2 % top-1.

Source: Ding et al., ECCV 2022; the rest is in `_davit.py`.
Drop path 0.2 as in the paper, not verified against the training logs.
"""

_base_ = "_davit.py"

model = dict(backbone=dict(name="davit_s", drop_path_rate=0.2))
