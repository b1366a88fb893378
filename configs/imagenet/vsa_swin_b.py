"""VSA-Swin-B on ImageNet-1k; no published accuracy is known.

Source: see `_vsa_swin.py`. Drop path 0.5, as Swin-B's in Swin's paper.
"""

_base_ = "_vsa_swin.py"

model = dict(backbone=dict(name="vsa_swin_b", drop_path_rate=0.5))
