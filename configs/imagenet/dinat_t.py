"""DiNAT-Tiny on ImageNet-1k; published 82.7 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="dinat_t", drop_path_rate=0.2))
