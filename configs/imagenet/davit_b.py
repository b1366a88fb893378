"""DaViT-B on ImageNet-1k; published 84.6 % top-1.

Source: Ding et al., ECCV 2022; the rest is in `_davit.py`.
Drop path 0.4 as in the paper, not verified against the training logs.
"""

_base_ = "_davit.py"

model = dict(backbone=dict(name="davit_b", drop_path_rate=0.4))
