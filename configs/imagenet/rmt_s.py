"""RMT-S on ImageNet-1k; published 84.1 % top-1.

Source: Fan et al., CVPR 2024; the rest is in `_rmt.py`. Drop path 0.15.
"""

_base_ = "_rmt.py"

model = dict(backbone=dict(name="rmt_s", drop_path_rate=0.15))
