"""RMT-T on ImageNet-1k; published 82.4 % top-1.

Source: Fan et al., CVPR 2024; the rest is in `_rmt.py`. Drop path 0.1.
"""

_base_ = "_rmt.py"

model = dict(backbone=dict(name="rmt_t", drop_path_rate=0.1))
