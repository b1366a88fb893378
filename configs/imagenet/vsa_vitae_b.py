"""VSA-ViTAE-B (ViTAEv2*-B + VSA) on ImageNet-1k, 16 processes of 64 images; no published accuracy without more data.

Source: that of `vsa_vitae_48m.py`, the largest size with a published script; drop path 0.3 is our own choice. The
authors' 86.2 % come from pretraining with ImageNet-22k.
"""

_base_ = "_vsa_vitae.py"

model = dict(backbone=dict(name="vsa_vitae_b", drop_path_rate=0.3))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(weight_decay=0.055))
