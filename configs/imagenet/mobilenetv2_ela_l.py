"""MobileNetV2 with ELA-L on ImageNet-1k: 200 epochs, 2 processes of 128 images; no published accuracy is known.

Source: the training script of github.com/Xuwei86/ELA_Code (commit cd4594d, `MbV2/imagenet.py`), its example command and
defaults. The script's "step" decay is an exponential one, to a tenth of the first rate at the end; there is no warm-up,
and weight decay applies to all parameters, norms and biases included. Differences that we know of:

- the script lowers the rate at every iteration, here it is lowered after every epoch (by 1.1 %);
- the script never reseeds its distributed sampler, so that every epoch has the same order; here all are shuffled anew.

No training with this file has been run to its end.
"""

data_root = "data/imagenet"

model = dict(backbone=dict(name="mobilenetv2_ela_l", num_classes=1000, drop_rate=0.1))

train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    dataset=dict(
        source=dict(type="image_folder", split="train"),
        transform=dict(is_training=True, input_size=224, color_jitter=None, interpolation="bilinear"),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=10,
    dataset=dict(
        source=dict(type="image_folder", split="val"),
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bilinear"),
    ),
)

auto_scale_lr = dict(base_batch_size=256)
optim_wrapper = dict(
    optimizer=dict(
        opt="momentum",  # timm's name for SGD without Nesterov's look-ahead
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        filter_bias_and_bn=False,
    )
)
param_scheduler = [dict(type="ExponentialLR", gamma=0.1 ** (1 / 200), by_epoch=True, begin=0, end=200)]
train_cfg = dict(max_epochs=200)
