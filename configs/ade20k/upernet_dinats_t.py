"""UPerNet on DiNAT_s-Tiny, ADE20K; published mIoU 46.0 % (multi-scale and flip 47.4 %).

Source: Hassani and Shi, 2022 (arXiv 2209.15001), and github.com/SHI-Labs/Neighborhood-Attention-Transformer (commit
d334f5bb). Dilations are those of the authors' segmenters. The authors train in half precision (`--amp fp16`). The
rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(
        name="dinats_t",
        pretrained=True,
        drop_path_rate=0.3,
        dilations=((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
