"""UPerNet on NAT-Mini, ADE20K; published mIoU 45.1 % (multi-scale and flip 46.4 %).

Source: Hassani et al., CVPR 2023 (arXiv 2204.07143), and github.com/SHI-Labs/Neighborhood-Attention-Transformer
(commit d334f5bb). The authors train in half precision (`--amp fp16`). The rest is in the bases.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="nat_mini", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
