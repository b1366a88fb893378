"""NAT-Tiny on ImageNet-1k; published 83.2 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="nat_t", drop_path_rate=0.2))
