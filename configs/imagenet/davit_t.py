"""DaViT-T on ImageNet-1k; published 82.8 % top-1.

Source: Ding et al., ECCV 2022; the rest is in `_davit.py`. Drop path 0.1, the paper's and the script's default.
"""

_base_ = "_davit.py"

model = dict(backbone=dict(name="davit_t", drop_path_rate=0.1))
