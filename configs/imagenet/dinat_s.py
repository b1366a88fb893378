"""DiNAT-Small on ImageNet-1k; published 83.8 % top-1.

Source: see `_nat.py`.
"""

_base_ = "_nat.py"

model = dict(backbone=dict(name="dinat_s", drop_path_rate=0.3))
