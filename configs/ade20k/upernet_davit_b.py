"""UPerNet on DaViT-B, ADE20K; published mIoU 49.4 %.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' config, which is that of DaViT-T; plain batch norms in the heads. The rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="davit_b", pretrained=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024], norm_cfg=dict(type="BN")),
    auxiliary_head=dict(in_channels=512, norm_cfg=dict(type="BN")),
)
