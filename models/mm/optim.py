"""Optimizers that follow what models declare, and autocast on every device.

timm's optimizers get mmengine's accumulation, clipping and schedules; mmengine's get timm's layer-wise learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from vitrail.models._dense import DenseBackbone

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
        return _wrap(self.config, self.build_optimizer(model))

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
        optimizer.register_step_pre_hook(lambda *_: classifier.check_losses())
        for group in optimizer.param_groups:
            # timm's schedulers would apply the scale at every step; mmengine's start from each group's own rate.
            group["lr"] *= group.pop("lr_scale", 1.0)
        return optimizer


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor:
    """Learning rates that fall from layer to layer towards the image, in the backbone of a detector or segmenter.

    A layer's rate is `layer_decay` times that of the next one; neck, heads and the backbone's output norms have the
    whole rate. The layers are those of the model's `group_matcher`. Parameters of one dimension (biases, norms) and
    those that the model's `no_weight_decay` names have no weight decay. The backbone is a `VitrailBackbone`.

    Args:
        optim_wrapper_cfg: With the optimizer, of mmengine's registry, under `optimizer`.
        paramwise_cfg: `layer_decay`, in (0, 1], and optionally `coarse`: True decays by stages in place of blocks.

    Raises:
        ValueError: `paramwise_cfg` holds something else.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        given = dict(paramwise_cfg or {})
        if "layer_decay" not in given or not given.keys() <= {"layer_decay", "coarse"}:
            raise ValueError(f"paramwise_cfg is {given}; allowed: layer_decay, and optionally coarse")
        if not 0 < given["layer_decay"] <= 1:
            raise ValueError(f"layer_decay is {given['layer_decay']}; allowed: 0 < layer_decay <= 1")
        self.config = dict(optim_wrapper_cfg)
        self.layer_decay, self.coarse = given["layer_decay"], bool(given.get("coarse"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer of a (possibly wrapped) detector or segmenter."""
        return _wrap(self.config, self.build_optimizer(model))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimizer alone.

        Raises:
            ValueError: The model's backbone is of another kind, or the optimizer has an unknown argument.
            NotImplementedError: The backbone's model declares no layers.
        """
        config = dict(self.config["optimizer"])
        scales, exempt = self._backbone_rules(getattr(model, "module", model))
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in getattr(model, "module", model).named_parameters():
            if not parameter.requires_grad:
                continue
            key = (scales.get(name, 1.0), parameter.ndim > 1 and name not in exempt)
            groups.setdefault(key, {"params": [], "lr": config["lr"] * key[0]})["params"].append(parameter)
            if not key[1]:
                groups[key]["weight_decay"] = 0.0
        # The log shows the rate of the first group: that of the heads.
        config["params"] = [group for _, group in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
        try:
            return OPTIMIZERS.build(config)
        except TypeError as error:
            raise ValueError(f"optimizer: {error}") from error

    def _backbone_rules(self, model: nn.Module) -> tuple[dict[str, float], set[str]]:
        """Factors of the learning rate, and names without weight decay, of the backbone's layers."""
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, DenseBackbone):
            raise ValueError(f"layer decay needs a VitrailBackbone; the model's is {type(backbone).__name__}")
        inner, prefix = backbone.model, "backbone.model."
        if not hasattr(inner, "group_matcher"):
            raise NotImplementedError(f"layer decay: {type(inner).__name__} has no group_matcher")
        layers = group_parameters(inner, inner.group_matcher(coarse=self.coarse), reverse=True)
        depth = max(layers.values()) + 1
        scales = {prefix + name: self.layer_decay ** (depth - layer) for name, layer in layers.items()}
        patterns = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
        exempt = {prefix + name for name in layers if any(fnmatch(name, pattern) for pattern in patterns)}
        return scales, exempt


def _wrap(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> OptimWrapper:
    config = {name: value for name, value in config.items() if name != "optimizer"}
    config.setdefault("type", "OptimWrapper")
    return OPTIM_WRAPPERS.build(config, default_args={"optimizer": optimizer})
