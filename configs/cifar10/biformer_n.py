"""BiFormer-N on CIFAR-10, 32 pixels: data_root holds torchvision's `cifar-10-batches-py`.

Source of the recipe: our own, after the regularisation that small-image training of vision transformers commonly
uses. The model card has the accuracy of a shorter training; that of the whole one has not been measured.
"""

_base_ = "_cifar10.py"

model = dict(backbone=dict(name="biformer_n"))
