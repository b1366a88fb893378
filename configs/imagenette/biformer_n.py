"""BiFormer-N on Imagenette at 96 pixels: an image folder (train/ and val/) of ten ImageNet classes, for small machines.

Source of the recipe: our own. Its accuracy has not been measured.
"""

data_root = "data/imagenette"

model = dict(backbone=dict(name="biformer_n", num_classes=10, drop_path_rate=0.1), label_smoothing=0.1)

train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    dataset=dict(
        source=dict(type="image_folder", split="train"),
        transform=dict(
            is_training=True,
            input_size=96,
            scale=(0.35, 1.0),
            color_jitter=None,
            auto_augment="rand-m7-mstd0.5-inc1",
            re_prob=0.1,
            re_mode="pixel",
            interpolation="bicubic",
        ),
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        source=dict(type="image_folder", split="val"),
        transform=dict(input_size=96, crop_pct=0.95, interpolation="bicubic"),
    ),
)

auto_scale_lr = dict(base_batch_size=64)
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=75, eta_min=1e-5, by_epoch=True, begin=5, end=80, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=80)
