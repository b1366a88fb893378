"""RMT-L on ImageNet-1k; published 85.5 % top-1.

Source: Fan et al., CVPR 2024; the rest is in `_rmt.py`. Drop path 0.5. It is the authors' L6.
"""

_base_ = "_rmt.py"

model = dict(backbone=dict(name="rmt_l", drop_path_rate=0.5))
