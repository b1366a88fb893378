"""VSA-Swin-S on ImageNet-1k; published 83.6 % top-1.

Source: see `_vsa_swin.py`. Drop path 0.3, as Swin-S's in Swin's paper.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="vsa_swin_s", drop_path_rate=0.3))
