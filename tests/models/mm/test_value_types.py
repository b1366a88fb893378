"""Values of a config that are of another type than what they are given to are named."""

from typing import Any, Optional

import pytest

pytest.importorskip("mmseg", reason="needs onedl-mmsegmentation: pip install vitrail[mm]")

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, TASK_UTILS, TRANSFORMS, DefaultScope, Registry

from vitrail.models.mm.dense_runner import build_model, complete_dense_config, register_library
from vitrail.models.mm.value_types import check_value_types
from vitrail.tools._common.configs import packaged_configs, read_config

THINGS = Registry("thing")


@THINGS.register_module()
class Base:
    def __init__(
        self,
        weight=1.0,
        count: int = 3,
        name: str = "x",
        scale: Optional[float] = None,  # noqa: UP045
        size=3,
    ) -> None:
        pass


@THINGS.register_module()
class Child(Base):
    def __init__(
        self,
        flag=False,
        mode="mean",
        bias="auto",
        shape: tuple = (1, 2),
        lr: "float | None" = 1e-3,
        dim: "Optional[int]" = 3,  # noqa: UP045
        **kwargs: Any,
    ) -> None:
        pass


@THINGS.register_module()
class Closed(Base):
    def __init__(self, other: bool | int = 1) -> None:
        pass


@THINGS.register_module()
def make_thing(weight: float) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Base", "weight": "abc"}, r"^part\.weight is 'abc'; Base takes a number$"),
        ({"type": "Base", "count": "3"}, r"^part\.count is '3'; Base takes a number$"),
        ({"type": "Base", "scale": "big"}, r"^part\.scale is 'big'; Base takes a number$"),
        ({"type": "Child", "lr": "fast"}, r"^part\.lr is 'fast'; Child takes a number$"),
        ({"type": "Child", "dim": "1x"}, r"^part\.dim is '1x'; Child takes a number$"),
        ({"type": "Child", "flag": "yes"}, r"^part\.flag is 'yes'; Child takes a truth value$"),
        ({"type": "Child", "weight": "x"}, r"^part\.weight is 'x'; Child takes a number$"),  # which its base has
        ({"type": "Closed", "other": "x"}, r"^part\.other is 'x'; Closed takes a truth value or a number$"),
        ({"type": "make_thing", "weight": "x"}, r"^part\.weight is 'x'; make_thing takes a number$"),
        ({"type": Base, "weight": "abc"}, r"^part\.weight is 'abc'; Base takes a number$"),
        ({"inner": [{"type": "Base"}, {"type": "Base", "size": ""}]}, r"^part\.inner\.1\.size is ''; Base takes"),
        ({"type": "Unknown", "x": {"y": {"type": "Base", "weight": "abc"}}}, r"^part\.x\.y\.weight is 'abc'"),
    ],
)
def test_wrong_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_value_types("part", settings, (Registry("none"), THINGS))


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "Base", "weight": 2, "count": [2], "size": (3, 3), "scale": None, "name": 3.5},
        {"type": "Child", "flag": 1, "lr": {}, "bias": True, "shape": "any", "mode": 0, "unknown": "x", "weight": True},
        {"type": "Closed", "weight": "which it does not take, building it says so"},
        {"type": "Unknown", "weight": "abc"},
        {"type": "nowhere.Base", "weight": "abc"},
        {"weight": "abc", "list": ["a", 1, None]},
        {"type": None, "weight": "abc"},
        {"type": dict, "weight": "abc"},
    ],
)
def test_values_that_may_be_meant(settings: dict[str, Any]) -> None:
    check_value_types("part", settings, (THINGS,))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decode_head.loss_decode.loss_weight", "abc", r"CrossEntropyLoss takes a number"),
        ("decode_head.loss_decode.use_sigmoid", "yes", r"CrossEntropyLoss takes a truth value"),
        ("decode_head.dropout_ratio", "abc", r"UPerHead takes a number"),
        ("decode_head.norm_cfg.eps", "abc", r"SyncBatchNorm takes a number"),
        ("backbone.drop_path_rate", "abc", r"VitrailBackbone takes a number"),
    ],
)
def test_a_segmenter_is_not_built_with_them(key: str, value: Any, message: str) -> None:
    config = read_config(packaged_configs()["camvid/upernet_biformer_n"])
    config.merge_from_dict({f"model.{key}": value})
    with pytest.raises(ValueError, match=rf"^model\.{key} is '{value}'; {message}$"):
        build_model(complete_dense_config(config))


@pytest.mark.parametrize(
    "name", ["camvid/vwformer_biformer_n", "coco/cascade_mask_rcnn_davit_t_3x", "kitti/scatterformer_kitti",
             "ade20k/vwformer_mask2former_swin_t"]
)  # fmt: skip
def test_packaged_configs_pass(name: str) -> None:
    config: Config = complete_dense_config(read_config(packaged_configs()[name]))
    register_library(config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        check_value_types("model", config.model.to_dict(), (MODELS, TASK_UTILS))
        check_value_types("train_dataloader", config.train_dataloader.to_dict(), (DATASETS, TRANSFORMS))
