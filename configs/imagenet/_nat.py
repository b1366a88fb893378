"""What the ImageNet-1k recipes of NAT, DiNAT and DiNAT_s share: 300 epochs and 10 of cool-down, 1024 images a step.

Source: Hassani et al., CVPR 2023 (arXiv 2204.07143), section 4.1, and the configuration files of
github.com/SHI-Labs/Neighborhood-Attention-Transformer (commit d334f5bb). Differences that we know of:

- the cosine of the authors runs beneath the warm-up from epoch 0; here it starts where the warm-up ends;
- the tables of relative positions are spared from weight decay, as the authors' models ask for; whether their training
  code listened is not known.

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
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
)

auto_scale_lr = dict(base_batch_size=1024)
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", T_max=280, eta_min=5e-6, by_epoch=True, begin=20, end=300, convert_to_iter_based=True
    ),
]
train_cfg = dict(max_epochs=310)
