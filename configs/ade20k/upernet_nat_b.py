"""UPerNet on NAT-Base, ADE20K; published mIoU 48.5 % (multi-scale and flip 49.7 %).

Source: Hassani et al., CVPR 2023 (arXiv 2204.07143), and github.com/SHI-Labs/Neighborhood-Attention-Transformer
(commit d334f5bb). The authors train in half precision (`--amp fp16`). The rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="nat_b", pretrained=True, drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
