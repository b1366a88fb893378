"""DaViT-L on ImageNet-1k at 384 pixels; published 86.9 % top-1 (87.5 % after ImageNet-22k).

Source: Ding et al., ECCV 2022, for the architecture and the input size. The authors released neither weights nor the
recipe of this size: the rest is `_davit.py`'s with smaller batches (the learning rate follows), drop path 0.4 is that
of the base model. Not verified.
"""

_base_ = "_davit.py"

model = dict(backbone=dict(name="davit_l", drop_path_rate=0.4))
train_dataloader = dict(batch_size=32, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
