"""MaskFormer with VWFormer's pixel decoder on Swin-T, ADE20K; published mIoU 47.4 % (multi-scale and flip 49.0 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): the form of the pixel decoder.
The rest is in the bases.
"""

_base_ = ["_vwformer_maskformer.py", "_vwformer_masks_512.py"]

model = dict(
    backbone=dict(name="swin_tiny_patch4_window7_224.ms_in1k"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
