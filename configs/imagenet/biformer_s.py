"""BiFormer-S on ImageNet-1k; published 83.8 % top-1.

Source: Zhu et al., CVPR 2023; the rest is in `_biformer.py`. Drop path 0.15.
"""

_base_ = "_biformer.py"

model = dict(backbone=dict(name="biformer_s", drop_path_rate=0.15))
