"""What the ImageNet-1k recipes of L2ViT share: 300 epochs, 8 processes of 512 images.

Source: Zheng (arXiv 2501.16182) and the training commands of github.com/ChuanyangZheng/L2ViT (commit fad0341), without
mixed precision, as the author trained. Differences that we know of: the author's cosine runs beneath the warm-up from
epoch 0; here it starts where the warm-up ends. The split of the 4096 images over processes is our choice.

No training with these files has been run to its end.
"""

data_root = "data/imagenet"

model = dict(
    backbone=dict(num_classes=1000),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
)

train_dataloader = dict(
    batch_size=512,
    num_workers=10,
    dataset=dict(
        source=dict(type="image_folder", split="train"),
        transform=dict(
            is_training=True,
            input_size=224,
            color_jitter=0.4,  # timm leaves it out where RandAugment is on, as the authors' code does
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
            interpolation="bicubic",
        ),
    ),
)
val_dataloader = dict(
    batch_size=192,
    num_workers=10,
    dataset=dict(
        source=dict(type="image_folder", split="val"),
        transform=dict(input_size=224, crop_pct=0.9, interpolation="bicubic"),
    ),
)

auto_scale_lr = dict(base_batch_size=4096)
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=4e-3, weight_decay=0.05, eps=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", T_max=280, eta_min=1e-6, by_epoch=True, begin=20, end=300, convert_to_iter_based=True
    ),
]
train_cfg = dict(max_epochs=300)
custom_hooks = [
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4, update_buffers=True, strict_load=True)
]
