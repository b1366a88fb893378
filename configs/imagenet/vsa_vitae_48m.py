"""VSA-ViTAE-48M (ViTAEv2*-48M + VSA) on ImageNet-1k, 16 processes of 64 images; published 83.9 % top-1.

Source: the authors' script `ViTAEv2_VSA_widePCM_48M.sh`; the rest is in `_vsa_vitae.py`. Drop path 0.25.
"""

_base_ = "_vsa_vitae.py"

model = dict(backbone=dict(name="vsa_vitae_48m", drop_path_rate=0.25))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(weight_decay=0.055))
