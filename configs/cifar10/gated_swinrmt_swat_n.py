"""Gated-SwinRMT-SWAT-N on CIFAR-10, 32 pixels: data_root holds torchvision's `cifar-10-batches-py`.

The same for RMT and both forms of Gated-SwinRMT, so that they can be compared; take several seeds.

The model is our reading of the paper's abstract.

Source of the recipe: our own, after the regularisation that small-image training of vision transformers commonly
uses. Its accuracy has not been measured.
"""

_base_ = "_cifar10.py"

model = dict(backbone=dict(name="gated_swinrmt_swat_n"))
