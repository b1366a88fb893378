"""VWFormer head on Swin-B, ADE20K at 640 x 640; published mIoU 52.5 % (multi-scale and flip 53.5 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): drop path 0.3, learning rate decayed by 0.85 over 12 groups of
layers. Here each of the 24 blocks is a layer; 0.92 gives the stem the same rate. The starting weights are our choice.
The rest is in the bases.
"""

_base_ = ["_vwformer.py", "_vwformer_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(name="swin_base_patch4_window12_384.ms_in22k", drop_path_rate=0.3),
    decode_head=dict(in_channels=(128, 256, 512, 1024)),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.92))
