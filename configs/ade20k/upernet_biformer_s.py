"""UPerNet on BiFormer-S, ADE20K; published mIoU 49.8 % (multi-scale and flip 50.8 %).

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 8 x 8 regions,
statistics of all processes in the batch norms. The rest is in the bases.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="biformer_s", checkpoint="checkpoints/biformer_s_in1k.pth", drop_path_rate=0.3, n_win=8),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

sync_bn = "torch"
