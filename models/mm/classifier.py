"""A timm classifier with its loss, as mmengine trains it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitrail.models.mm.parallel import checkpoint_blocks


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the weights have not been touched by that step."""


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """A model of timm's registry with a classification loss, and mixing of images and labels in training.

    Args:
        backbone: Arguments of `timm.create_model`; the entry point's name under `name`.
        label_smoothing: Share of the target spread evenly over the classes.
        mixup: Arguments of `timm.data.Mixup` other than the number of classes and the smoothing; None for no mixing.
        grad_checkpointing: Keep the blocks' inputs alone and compute the blocks again in the backward pass.

    Raises:
        NotImplementedError: The model cannot compute its blocks again.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        arguments = dict(backbone)
        self.backbone = timm.create_model(arguments.pop("name"), **arguments)
        if grad_checkpointing:
            checkpoint_blocks(self.backbone, "grad_checkpointing")
        self.predict_dtype: torch.dtype | None = None  # of autocast, where the weights are of low precision
        self.mixup = None
        self._unchecked: list[_UncheckedLoss] = []
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if mixup is not None:
            num_classes = self.backbone.num_classes
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup)
            self.criterion = SoftTargetCrossEntropy()
        elif label_smoothing > 0:
            self.criterion = LabelSmoothingCrossEntropy(label_smoothing)

    def init_weights(self) -> None:
        """Leaves the weights as timm made or loaded them (mmengine would initialise them again)."""

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, unreadable: Tensor, mode: str = "predict"
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses (`mode="loss"`) or logits.

        Args:
            images: (B, C, H, W), or (0,) in prediction: none of the batch could be decoded.
            labels: (B,), integers.
            indices: (B,), places in the data set.
            unreadable: Places in the data set whose images could not be decoded.
            mode: "loss" or "predict".

        Returns:
            For "loss": `loss_cls`, and without mixing `accuracy`, the share of right answers on the batch. For
            "predict": a list of one dict (mmengine wants a sequence) with `logits` (B, num_classes) in float32,
            `labels`, `indices` and `unreadable`.
        """
        if mode == "predict":
            with torch.autocast(images.device.type, self.predict_dtype) if self.predict_dtype else nullcontext():
                logits = self.backbone(images) if len(images) else images.new_zeros(0, self.backbone.num_classes)
            logits = logits.float()
            return [{"logits": logits, "labels": labels, "indices": indices, "unreadable": unreadable}]
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            return {"loss_cls": self.criterion(self.backbone(images).float(), targets)}
        logits = self.backbone(images).float()
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return {"loss_cls": self.criterion(logits, labels), "accuracy": accuracy}

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums the losses; `check_losses` stops before a sum that is not finite can reach the weights.

        Raises:
            NonFiniteLossError: An earlier loss was not finite, and no step of the optimizer followed it.
        """
        self.check_losses()
        total, log_vars = super().parse_losses(losses)
        self._unchecked.append(_UncheckedLoss(total.detach()))
        return total, {name: log_value.detach() for name, log_value in log_vars.items()}

    def check_losses(self) -> None:
        """Checks the losses since the last call; the optimizer of this model calls it before its step.

        By then the backward pass is under way on a GPU, which therefore does not wait for the host's answer.

        Raises:
            NonFiniteLossError: With the step, and what to try.
        """
        unchecked, self._unchecked = self._unchecked, []
        for loss in unchecked:
            loss.check()


class _UncheckedLoss:
    """A loss on its way to the host."""

    def __init__(self, loss: Tensor) -> None:
        info = MessageHub.get_current_instance().runtime_info
        self._place = info.get("iter", 0) + 1, info.get("epoch", 0) + 1
        self._arrival = torch.cuda.Event() if loss.is_cuda else None
        self._value = loss
        if self._arrival is not None:
            self._value = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
            self._arrival.record()

    def check(self) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()
        value = float(self._value)
        if not math.isfinite(value):
            iteration, epoch = self._place
            raise NonFiniteLossError(
                f"the loss is {value} in iteration {iteration} (epoch {epoch}); the last checkpoint is from before. "
                "Try a lower learning rate (optim_wrapper.optimizer.lr), gradient clipping "
                "(optim_wrapper.clip_grad.max_norm=1.0), bf16 in place of fp16, or a longer warm-up"
            )


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and fixed parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def check_fits(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Tries the model on one image of zeros.

    Args:
        model: Its training mode is kept.
        image_shape: (C, H, W) of what the data will be.
        num_classes: How many classes the data have.

    Raises:
        ValueError: The image is too small or has the wrong number of channels, or the classifier's width differs.
    """
    device = next(model.parameters()).device
    was_training = model.training
    try:
        logits = model.eval()(torch.zeros(1, *image_shape, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(str(extent) for extent in image_shape[1:])
        raise ValueError(
            f"the model cannot take images of {image_shape[0]} channels and {size} pixels: {error}"
        ) from error
    finally:
        model.train(was_training)
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"the data have {num_classes} classes, the model's output for an image is {tuple(logits.shape[1:])}"
        )
