"""Gated-SwinRMT-Retention (our reading of the abstract) on ImageNet-1k; the paper gives no figure for this data set.

Source: RMT's recipe (`_rmt.py`), for a comparison on equal terms. The paper (arXiv 2604.06014) trained on
Mini-ImageNet and CIFAR-10; its epochs, rates and augmentation are not in the part that we could read. Drop path 0.2
is our choice.
"""

_base_ = "_rmt.py"

model = dict(backbone=dict(name="gated_swinrmt_retention", drop_path_rate=0.2))
