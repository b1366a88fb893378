"""UPerNet on L2ViT-Small, ADE20K; the authors publish no figure with their code.

Source: Zheng, 2025 (arXiv 2501.16182), and the configs of github.com/ChuanyangZheng/L2ViT (commit 52f008c9). Norms
are decayed like all weights. Plain batch norms in the heads. The rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="l2vit_s", pretrained=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768], norm_cfg=dict(type="BN")),
    auxiliary_head=dict(in_channels=384, norm_cfg=dict(type="BN")),
)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=1.0))
