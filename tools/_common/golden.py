"""Official models without their weights: the golden recipe fills a checkpoint by its keys' names and knows the outputs.

A folder of golden cases is not part of the package; where it is there (`VITRAIL_SHARED`), conversions are proved by it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CASES = {
    "biformer_t": "biformer_tiny",
    "biformer_s": "biformer_small",
    "biformer_b": "biformer_base",
    "davit_t": "davit_tiny",
    "davit_s": "davit_small",
    "dinat_mini": "dinat_mini",
    "l2vit_t": "l2vit_tiny_224",
    "l2vit_s": "l2vit_small_224",
    "mobilenetv2_ela_l": "mobilenetv2_ela_l_224",
    "nat_mini": "nat_mini",
    "nat_s": "nat_small_224",
    "rmt_t": "rmt_tiny_224",
    "rmt_s": "rmt_small_224",
    "vsa_swin_t": "vsa_swin_tiny",
    "vsa_vitae_s": "vsa_vitaev2_s",
}


def golden_folder() -> Path | None:
    """The folder of golden cases: in `VITRAIL_SHARED`, else beside the checkout; None where there is none."""
    shared = os.environ.get("VITRAIL_SHARED")
    folder = (Path(shared) if shared else Path(__file__).resolve().parents[3] / "shared") / "golden"
    return folder if folder.is_dir() else None


def filled_checkpoint(folder: Path, variant: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The official layout of a variant filled by the recipe, the image and the official model's logits, all float64."""
    case = folder / CASES[variant]
    info = json.loads(case.with_suffix(".json").read_text())
    fill = _load(folder / "fill.py")
    weights = {
        key: torch.from_numpy(fill.filled_parameter(key, tuple(shape)))
        for key, shape in info["state_dict"].items()
        if key not in info.get("skipped", ())
    }
    given = info["input"]
    image = torch.from_numpy(fill.filled_array(given["name"], tuple(given["shape"])))
    with np.load(case.with_suffix(".npz")) as stored:
        logits = torch.from_numpy(np.asarray(stored["logits"]))
    return weights, image, logits


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
