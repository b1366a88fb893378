"""What the ImageNet-1k recipes of RMT share: 300 epochs and 10 of cool-down as DeiT, 8 processes of 256 images.

Source: Fan et al., CVPR 2024 (arXiv 2309.11523), and the training code, defaults and logs of github.com/qhfan/RMT
(commit 32ea2141): every published log peaks at a rate of 2e-3, that is 2048 images a step at 5e-4 for 512. The drop
paths are those that the authors' factories build in; their script's `--drop-path` does not reach the model.
Differences that we know of:

- the authors step the rate once an epoch, and their cosine runs beneath the warm-up from epoch 0; here it steps every
  iteration and starts where the warm-up ends;
- what is validated and exported are the averaged (EMA) weights, as in the authors' best figures (tiny: plain weights);
- layer scales, which the authors keep as (1, 1, 1, C), are spared from weight decay here.

No training with these files has been run to its end.
"""

data_root = "data/imagenet"

model = dict(
    backbone=dict(num_classes=1000),
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
)

train_dataloader = dict(
    batch_size=256,
    num_workers=10,
    sampler=dict(type="RepeatedSampler", num_repeats=3),
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
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
)

auto_scale_lr = dict(base_batch_size=512)  # 2e-3 with 8 processes of 256
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=5e-4, weight_decay=0.05, eps=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", T_max=295, eta_min=1e-5, by_epoch=True, begin=5, end=300, convert_to_iter_based=True
    ),
]
train_cfg = dict(max_epochs=310)
custom_hooks = [
    dict(
        type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1.6e-4, update_buffers=True, strict_load=True
    )  # decay 0.99996 for each 512 images, 0.99984 for 2048
]
