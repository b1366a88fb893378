"""UPerNet on RMT-Base, ADE20K; the authors publish no figure with their code.

Source: Fan et al., CVPR 2024 (arXiv 2309.11523), and the configs of github.com/qhfan/RMT. Batch norms take the
statistics of all processes. How many processes the authors use is not recorded; here it is 8. The authors train in
half precision (`--amp fp16`). The rest is in the bases.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_upernet.py", "_upernet_512.py"]

model = dict(
    backbone=dict(name="rmt_b", checkpoint="checkpoints/rmt_b_in1k.pth", drop_path_rate=0.4),
    decode_head=dict(in_channels=[80, 160, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

sync_bn = "torch"
