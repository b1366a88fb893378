"""What the ImageNet-1k recipes of VSA on Swin and of its plain twins share: 300 epochs, 8 processes of 128 images.

Source: the defaults of github.com/ViTAE-Transformer/QFormer (commit 8aabe08e, `config.py`), which are Swin's (Liu et
al., ICCV 2021, arXiv 2103.14030, appendix A2) plus averaged weights. The authors of VSA published no recipe for their
Swin-based models of 2022, so that this is the nearest known one; twins train on equal terms. Drop paths are those of
Swin's paper. Differences that we know of:

- the cosine of the authors runs beneath the warm-up from epoch 0; here it starts where the warm-up ends;
- what is validated and exported are the averaged (EMA) weights; the authors report the better of both, and Swin's
  published accuracies are the plain model's.

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
            interpolation="bicubic",
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

auto_scale_lr = dict(base_batch_size=512)  # 1e-3 with 1024 images a step
optim_wrapper = dict(optimizer=dict(opt="adamw", lr=5e-4, weight_decay=0.05, eps=1e-8), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", T_max=280, eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True
    ),
]
train_cfg = dict(max_epochs=300)
custom_hooks = [
    dict(
        type="EMAHook", ema_type="ExponentialMovingAverage", momentum=4e-5, update_buffers=True, strict_load=True
    )  # decay 0.99996
]
