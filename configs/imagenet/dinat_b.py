"""DiNAT-Base on ImageNet-1k; published 84.4 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="dinat_b", drop_path_rate=0.5))
