"""UPerNet on DaViT-S, ADE20K; published mIoU 48.8 %.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' config, which is that of DaViT-T; plain batch norms in the heads. The rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="davit_s", pretrained=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768], norm_cfg=dict(type="BN")),
    auxiliary_head=dict(in_channels=384, norm_cfg=dict(type="BN")),
)
