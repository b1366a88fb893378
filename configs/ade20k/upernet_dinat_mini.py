"""UPerNet on DiNAT-Mini, ADE20K; published mIoU 45.8 % (multi-scale and flip 47.2 %).

Source: Hassani and Shi, 2022 (arXiv 2209.15001), and github.com/SHI-Labs/Neighborhood-Attention-Transformer (commit
d334f5bb). Dilations are those of the authors' segmenters. The authors train in half precision (`--amp fp16`). The
rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(
        name="dinat_mini",
        pretrained=True,
        drop_path_rate=0.2,
        dilations=((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
