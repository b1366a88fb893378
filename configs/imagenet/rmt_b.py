"""RMT-B on ImageNet-1k; published 85.0 % top-1.

Source: Fan et al., CVPR 2024; the rest is in `_rmt.py`. Drop path 0.4. It is the authors' M2.
"""

_base_ = "_rmt.py"

model = dict(backbone=dict(name="rmt_b", drop_path_rate=0.4))
