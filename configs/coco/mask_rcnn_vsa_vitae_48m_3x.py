"""Mask R-CNN on ViTAEv2-48M with VSA, COCO 3x; published 49.9 box AP and 44.2 mask AP.

Source: Zhang et al., ECCV 2022 (arXiv 2204.08446), and the configs of github.com/ViTAE-Transformer/ViTAE-VSA (commit
75dc9867). The windows are padded and moved as in the authors' detectors, which need images of at least 224 x 224
pixels.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_mask_rcnn.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="vsa_vitae_48m",
        checkpoint="checkpoints/vsa_vitae_48m_in1k.pth",
        drop_path_rate=0.35,
        padding="center",
        offset_norm="floor_swapped",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)}),
)
