"""What the ADE20K recipes of VWFormer's decode head share: the head and 160k iterations; data stand beside this file.

Source: Yan et al., ICLR 2024 (arXiv 2404.16573), and the configs of github.com/yan-hao-tian/VW (commit 9bc1891). There
is no auxiliary head. The authors train ConvNeXt in half precision (`--amp fp16`).

No training with these files has been run to its end.
"""

default_scope = "mmseg"
custom_imports = dict(imports=["vitrail.models.mm.backbone", "vitrail.models.mm.vwformer"], allow_failed_imports=False)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(type="VitrailBackbone", pretrained=True, out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        type="VWHead",
        form="ade20k",
        num_classes=150,
        dropout_ratio=0.1,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, save_best="mIoU"),
)
log_processor = dict(by_epoch=False)
