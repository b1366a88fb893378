"""What the ImageNet-1k recipes of VSA on ViTAEv2 share: 300 epochs and 10 of cool-down, 1024 images a step.

Source: Zhang et al., ECCV 2022 (arXiv 2204.08446), and the scripts and defaults of the training code of
github.com/ViTAE-Transformer/ViTAE-VSA (commit 75dc9867). Differences that we know of:

- the authors step the rate once an epoch, and their cosine runs beneath the warm-up from epoch 0; here it steps every
  iteration and starts where the warm-up ends;
- predictions of the windows start at zero, as the paper says; in the authors' code they are drawn at random;
- what is validated and exported are the averaged (EMA) weights.

No training with these files has been run to its end.
"""

data_root = "data/imagenet"

model = dict(
    backbone=dict(num_classes=1000),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
)

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
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
            interpolation="random",
        ),
    ),
)
val_dataloader = dict(
    batch_size=192,
    num_workers=8,
    dataset=dict(
        source=dict(type="image_folder", split="val"),
        transform=dict(input_size=224, crop_pct=0.9, interpolation="bicubic"),
    ),
)

auto_scale_lr = dict(base_batch_size=512)  # 1e-3 with 1024 images a step
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=5e-4, weight_decay=0.05, eps=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", T_max=290, eta_min=1e-5, by_epoch=True, begin=10, end=300, convert_to_iter_based=True
    ),
]
train_cfg = dict(max_epochs=310)
custom_hooks = [
    dict(
        type="EMAHook", ema_type="ExponentialMovingAverage", momentum=8e-5, update_buffers=True, strict_load=True
    )  # decay 0.99996 for each 512 images, 0.99992 for 1024
]
