"""Swin-T, the plain twin of VSA-Swin-T, on ImageNet-1k; published 81.2 % top-1.

Source: see `_vsa_swin.py`. Drop path 0.2, Swin's paper's.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="swin_t", drop_path_rate=0.2))
