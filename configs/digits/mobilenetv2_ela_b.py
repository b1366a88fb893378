"""MobileNetV2 with ELA-B on scikit-learn's handwritten digits: minutes on a laptop's CPU.

Source of the recipe: our own.
"""

_base_ = "_digits.py"

model = dict(backbone=dict(name="mobilenetv2_ela_b", num_classes=10), label_smoothing=0.1)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=11, eta_min=1e-5, by_epoch=True, begin=1, end=12, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12)
