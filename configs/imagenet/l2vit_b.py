"""L2ViT-B on ImageNet-1k; published 84.4 % top-1.

Source: Zheng, arXiv 2501.16182; the rest is in `_l2vit.py`. Drop path 0.3: the author's.
"""

_base_ = "_l2vit.py"

model = dict(backbone=dict(name="l2vit_b", drop_path_rate=0.3))
