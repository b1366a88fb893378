"""RetinaNet on BiFormer-T, COCO 3x; the authors publish no figure.

Source: Zhu et al., CVPR 2023 (arXiv 2303.08810), and github.com/rayleizhu/BiFormer (commit 1697bbbe). 16 x 16
regions, batch norms keep their statistics. The drop path is our choice. The authors train 1x; the longer schedule is
our choice.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = ["_retinanet.py", "_3x.py"]

model = dict(
    backbone=dict(
        name="biformer_t",
        checkpoint="checkpoints/biformer_t_in1k.pth",
        drop_path_rate=0.1,
        n_win=16,
        norm_eval=True,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0001),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
