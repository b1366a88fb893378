"""UPerNet on DiNAT_s-Large, ADE20K at 640 x 640; published mIoU 53.4 % (multi-scale and flip 54.6 %).

Source: Hassani and Shi, 2022 (arXiv 2209.15001), and github.com/SHI-Labs/Neighborhood-Attention-Transformer (commit
d334f5bb). Dilations are those of the authors' segmenters. The authors train in half precision (`--amp fp16`). The
rest is in the bases.

The backbone starts from the authors' weights of ImageNet-22k, which have to be fetched by hand:
projects/dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth at shi-labs.com.
"""

_base_ = ["_upernet.py", "_upernet_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        name="dinats_l",
        checkpoint="checkpoints/dinat_s_large_in22k_224.pth",
        drop_path_rate=0.3,
        dilations=((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
