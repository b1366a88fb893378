"""What the recipes on scikit-learn's handwritten digits share: 32 pixels, 15 epochs, minutes on a laptop's CPU.

Source of the recipe: our own.
"""

train_dataloader = dict(
    batch_size=48,
    dataset=dict(
        source=dict(type="digits", split="train"),
        transform=dict(
            is_training=True,
            input_size=32,
            scale=(0.7, 1.0),
            ratio=(0.8, 1.25),
            hflip=0.0,  # a mirrored digit is another sign
            color_jitter=None,
            interpolation="bilinear",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
    ),
)
val_dataloader = dict(
    batch_size=120,
    dataset=dict(
        source=dict(type="digits", split="val"),
        transform=dict(
            input_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
    ),
)

optim_wrapper = dict(optimizer=dict(opt="adamw", lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=14, eta_min=1e-5, by_epoch=True, begin=1, end=15, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15)
