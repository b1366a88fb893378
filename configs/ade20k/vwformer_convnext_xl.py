"""VWFormer head on ConvNeXt-XL, ADE20K at 640 x 640; published mIoU 54.6 % (multi-scale and flip 55.3 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): drop path 0.4, learning rate decayed by 0.9 from stage to stage.
mmsegmentation's rule, with 12 layers as the authors set it, has the last stage at 0.9^9 of the head's rate; here it has
0.9. The rest is in the bases. The starting weights are our choice.
"""

_base_ = ["_vwformer.py", "_vwformer_640.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(name="convnext_xlarge.fb_in22k", drop_path_rate=0.4),
    decode_head=dict(in_channels=(256, 512, 1024, 2048)),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.9, coarse=True))
