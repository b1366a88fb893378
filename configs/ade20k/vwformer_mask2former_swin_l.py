"""Mask2Former with VWFormer's pixel decoder on Swin-L, ADE20K; published mIoU 56.5 % (multi-scale and flip 57.8 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): the form of the pixel decoder.
The rest is in the bases. The starting weights are our choice.
"""

_base_ = ["_vwformer_mask2former.py", "_vwformer_masks_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(name="swin_large_patch4_window12_384.ms_in22k"),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
)
