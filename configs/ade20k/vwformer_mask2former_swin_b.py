"""Mask2Former with VWFormer's pixel decoder on Swin-B, ADE20K; published mIoU 54.6 % (multi-scale and flip 56.0 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): the form of the pixel decoder.
The rest is in the bases. The starting weights are our choice.
"""

_base_ = ["_vwformer_mask2former.py", "_vwformer_masks_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(name="swin_base_patch4_window12_384.ms_in22k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
)
