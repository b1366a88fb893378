"""L2ViT-S on ImageNet-1k; published 84.1 % top-1.

Source: Zheng, arXiv 2501.16182; the rest is in `_l2vit.py`. Drop path 0.2: our choice, the author gives none.
"""

_base_ = "_l2vit.py"

model = dict(backbone=dict(name="l2vit_s", drop_path_rate=0.2))
