"""UPerNet on BiFormer-N, CamVid with 11 classes.

Source of the recipe: our own; data and schedule are in `_camvid.py`.
"""

_base_ = "_camvid.py"

model = dict(
    decode_head=dict(
        type="UPerHead",
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=96,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type="SyncBN"),
        align_corners=False,
        ignore_index=11,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, avg_non_ignore=True),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=128,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type="SyncBN"),
        align_corners=False,
        ignore_index=11,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4, avg_non_ignore=True),
    ),
)
