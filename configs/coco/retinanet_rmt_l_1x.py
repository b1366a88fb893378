"""RetinaNet on RMT-Large, COCO 1x; the authors publish no figure with their code.

Source: Fan et al., CVPR 2024 (arXiv 2309.11523), and the configs of github.com/qhfan/RMT. Batch norms take the
statistics of all processes. How many processes the authors use is not recorded; here it is 8.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_retinanet.py", "_1x.py"]

model = dict(
    backbone=dict(name="rmt_l", checkpoint="checkpoints/rmt_l_in1k.pth", drop_path_rate=0.5),
    neck=dict(in_channels=[224, 448, 640]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0001),
)

sync_bn = "torch"
