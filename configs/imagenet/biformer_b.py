"""BiFormer-B on ImageNet-1k; published 84.3 % top-1.

Source: Zhu et al., CVPR 2023; the rest is in `_biformer.py`.
Drop path 0.4 as in the paper, not verified against a released file.
"""

_base_ = "_biformer.py"

model = dict(backbone=dict(name="biformer_b", drop_path_rate=0.4))
