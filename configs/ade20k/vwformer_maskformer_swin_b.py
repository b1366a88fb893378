"""MaskFormer with VWFormer's pixel decoder on Swin-B, ADE20K; published mIoU 53.8 % (multi-scale and flip 54.6 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): 8 heads, no shortcut around the attentions.
The rest is in the bases.
"""

_base_ = ["_vwformer_maskformer.py", "_vwformer_masks_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(name="swin_base_patch4_window12_384.ms_in22k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024], pixel_decoder=dict(decoder=dict(num_heads=8, shortcut=False))),
)
