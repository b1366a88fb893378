"""timm's optimizers with mmengine's accumulation, clipping and schedules, and autocast on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Mixed precision: bfloat16 on CPU and CUDA, float16 with loss scaling on CUDA.

    mmengine's own wrapper refuses to run without a GPU.

    Args:
        precision: "bf16" or "fp16".
        device_type: "cpu" or "cuda".
        **kwargs: Of mmengine's `OptimWrapper`.

    Raises:
        ValueError: The precision is unknown or does not run on the device.
    """

    def __init__(self, precision: str, device_type: str, **kwargs: Any) -> None:
        if precision not in AUTOCAST_DTYPES:
            raise ValueError(f"precision is {precision!r}; allowed: {', '.join(AUTOCAST_DTYPES)}")
        if precision == "fp16" and device_type != "cuda":
            raise ValueError(f"fp16 training needs a CUDA GPU, the device is {device_type}; use bf16")
        super().__init__(**kwargs)
        self.dtype = AUTOCAST_DTYPES[precision]
        self.device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass, besides what mmengine does for accumulation."""
        with super().optim_context(model), torch.autocast(self.device_type, self.dtype):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward pass of the scaled loss."""
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Clips and applies the unscaled gradients; the scaler leaves out a step with overflow."""
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the loss scale."""
        return {**super().state_dict(), "loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, also from a run without loss scaling."""
        state_dict = dict(state_dict)
        scaler_state = state_dict.pop("loss_scaler", None)
        if scaler_state and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler_state)
        super().load_state_dict(state_dict)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Builds the optimizer by timm's factory: weight decay and layer decay follow what the model declares.

    The config's `optimizer` holds arguments of `timm.optim.create_optimizer_v2` (`opt`, `lr`, `weight_decay`,
    `layer_decay`, ...); the model's `no_weight_decay` and `group_matcher` sort the parameters.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if paramwise_cfg:
            raise ValueError("paramwise_cfg is not used here: the model's group_matcher and no_weight_decay decide")
        self.config = dict(optim_wrapper_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer of a (possibly wrapped) `TimmClassifier`."""
        config = {name: value for name, value in self.config.items() if name != "optimizer"}
        config.setdefault("type", "OptimWrapper")
        return OPTIM_WRAPPERS.build(config, default_args={"optimizer": self.build_optimizer(model)})

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimizer alone.

        Raises:
            ValueError: Its name or an argument is unknown.
        """
        classifier = getattr(model, "module", model)
        try:
            optimizer = create_optimizer_v2(classifier.backbone, **self.config["optimizer"])
        except TypeError as error:
            raise ValueError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            # timm's schedulers would apply the scale at every step; mmengine's start from each group's own rate.
            group["lr"] *= group.pop("lr_scale", 1.0)
        return optimizer
