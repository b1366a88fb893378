"""MaskFormer with VWFormer's pixel decoder on Swin-S, ADE20K; published mIoU 50.5 % (multi-scale and flip 52.7 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): no shortcut around the attentions.
The rest is in the bases.
"""

_base_ = ["_vwformer_maskformer.py", "_vwformer_masks_512.py"]

model = dict(
    backbone=dict(name="swin_small_patch4_window7_224.ms_in1k"),
    decode_head=dict(in_channels=[96, 192, 384, 768], pixel_decoder=dict(decoder=dict(shortcut=False))),
)
