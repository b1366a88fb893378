"""VSA-Swin-T on ImageNet-1k; published 82.24 % top-1.

Source: see `_vsa_swin.py`. Drop path 0.2, as Swin-T's in Swin's paper.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="vsa_swin_t", drop_path_rate=0.2))
