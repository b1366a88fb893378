"""VSA-ViTAE-S (ViTAEv2*-S + VSA) on ImageNet-1k, 8 processes of 128 images; published 82.7 % top-1.

Source: the authors' script `ViTAEv2_VSA_S.sh`; the rest is in `_vsa_vitae.py`. Drop path 0.1, the code's default.
"""

_base_ = "_vsa_vitae.py"

model = dict(backbone=dict(name="vsa_vitae_s", drop_path_rate=0.1))
