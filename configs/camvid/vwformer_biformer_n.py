"""VWFormer's decode head on BiFormer-N, CamVid with 11 classes; 128 channels inside, in place of the authors' 512.

Source of the recipe: our own; data and schedule are in `_camvid.py`.
"""

_base_ = "_camvid.py"
custom_imports = dict(imports=["vitrail.models.mm.backbone", "vitrail.models.mm.vwformer"], allow_failed_imports=False)

model = dict(
    decode_head=dict(
        type="VWHead",
        form="ade20k",
        decoder=dict(dim=128, low_channels=32),
        in_channels=(32, 64, 128, 256),
        channels=128,
        dropout_ratio=0.1,
        num_classes=11,
        ignore_index=11,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, avg_non_ignore=True),
    ),
)
