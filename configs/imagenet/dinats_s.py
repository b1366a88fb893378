"""DiNAT_s-Small on ImageNet-1k; published 83.5 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="dinats_s", drop_path_rate=0.3))
