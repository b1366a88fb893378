"""Swin-B, the plain twin of VSA-Swin-B, on ImageNet-1k; published 83.5 % top-1.

Source: see `_vsa_swin.py`. Drop path 0.5, Swin's paper's.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="swin_b", drop_path_rate=0.5))
