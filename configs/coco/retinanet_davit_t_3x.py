"""RetinaNet on DaViT-T, COCO 3x; published 46.5 box AP.

Source: Ding et al., ECCV 2022 (arXiv 2204.03645), and github.com/dingmyu/davit (commit fc79470d). Drop path as in
the authors' configs, which are those of DaViT-T.
"""

_base_ = ["_retinanet.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="davit_t",
        pretrained=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
