"""Semantic FPN on RMT-Small, ADE20K; the authors publish no figure with their code.

Source: Fan et al., CVPR 2024 (arXiv 2309.11523), and the configs of github.com/qhfan/RMT. 2 images a process, no
warm-up, norms are decayed too. Batch norms take the statistics of all processes. How many processes the authors use
is not recorded; here it is 8. The rest is in `_semantic_fpn.py`.

The backbone starts from the authors' ImageNet weights, which have to be fetched by hand: see the model card.
"""

_base_ = "_semantic_fpn.py"

model = dict(
    backbone=dict(name="rmt_s", checkpoint="checkpoints/rmt_s_in1k.pth", drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(norm_decay_mult=1.0))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, by_epoch=False, begin=0, end=80000)]

sync_bn = "torch"
