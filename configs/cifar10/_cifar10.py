"""What the recipes on CIFAR-10 share: 32 pixels; data_root holds torchvision's `cifar-10-batches-py`.

Source of the recipe: our own, after the regularisation that small-image training of vision transformers commonly
uses.
"""

data_root = "data/cifar10"

model = dict(
    backbone=dict(num_classes=10, drop_path_rate=0.1),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.5),
)

train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    dataset=dict(
        source=dict(type="cifar10", split="train"),
        transform=dict(
            is_training=True,
            input_size=32,
            scale=(0.5, 1.0),
            color_jitter=None,
            auto_augment="rand-m5-n2-mstd0.5-inc1",
            re_prob=0.1,
            re_mode="pixel",
            interpolation="bicubic",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=1,
    dataset=dict(
        source=dict(type="cifar10", split="val"),
        transform=dict(
            input_size=32,
            crop_pct=1.0,
            interpolation="bicubic",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
    ),
)

auto_scale_lr = dict(base_batch_size=128)
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=95, eta_min=1e-5, by_epoch=True, begin=5, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
