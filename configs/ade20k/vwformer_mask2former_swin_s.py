"""Mask2Former with VWFormer's pixel decoder on Swin-S, ADE20K; published mIoU 52.1 % (multi-scale and flip 53.7 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): the form of the pixel decoder.
The rest is in the bases.
"""

_base_ = ["_vwformer_mask2former.py", "_vwformer_masks_512.py"]

model = dict(
    backbone=dict(name="swin_small_patch4_window7_224.ms_in1k"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
