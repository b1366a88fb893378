"""VWFormer head on ConvNeXt-T, ADE20K at 512 x 512; published mIoU 47.3 % (multi-scale and flip 48.3 %).

Source: github.com/yan-hao-tian/VW (commit 9bc1891): drop path 0.4, learning rate decayed by 0.9 from stage to stage.
mmsegmentation's rule, with 6 layers as the authors set it, has the last stage at 0.9^3 of the head's rate; here it has
0.9. The rest is in the bases.
"""

_base_ = ["_vwformer.py", "_vwformer_512.py"]

model = dict(
    backbone=dict(name="convnext_tiny.fb_in1k", drop_path_rate=0.4),
    decode_head=dict(in_channels=(96, 192, 384, 768)),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.9, coarse=True))
