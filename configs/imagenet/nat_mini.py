"""NAT-Mini on ImageNet-1k; published 81.8 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="nat_mini", drop_path_rate=0.2))
