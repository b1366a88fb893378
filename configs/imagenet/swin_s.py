"""Swin-S, the plain twin of VSA-Swin-S, on ImageNet-1k; published 83.0 % top-1.

Source: see `_vsa_swin.py`. Drop path 0.3, Swin's paper's.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="swin_s", drop_path_rate=0.3))
