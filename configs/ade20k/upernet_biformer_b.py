"""UPerNet on BiFormer-B, ADE20K; published mIoU 51.0 % (multi-scale and flip 51.7 %).

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 8 x 8 regions,
statistics of all processes in the batch norms. The rest is in the bases.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="biformer_b", checkpoint="checkpoints/biformer_b_in1k.pth", drop_path_rate=0.4, n_win=8),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

sync_bn = "torch"
