"""Golden cases: what the official implementations compute, with weights and inputs made from their names.

case = load_case(golden_dir, "davit_tiny")
model.load_state_dict(checkpoint_filter_fn(case.weights, model))
errors = case.relative_errors({"logits": model(case.image), "stage0": first_map})
assert max(errors.values()) < 1e-8
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GoldenCase:
    """One case.

    Attributes:
        name: File name without its ending.
        info: The case's json: constructor facts, remarks, shapes.
        expected: Stored outputs, float64; maps are subsampled, with `<name>_mean` and `<name>_std` beside them.
        fill: The module that makes values from names.
    """

    name: str
    info: dict[str, Any]
    expected: dict[str, Tensor]
    fill: ModuleType

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """The official checkpoint: {official key: float64 tensor}, without the counters that no case fills."""
        filled = [(key, shape) for key, shape in self._manifest if key not in self.info.get("skipped", ())]
        return {key: torch.from_numpy(self.fill.filled_parameter(key, tuple(shape))) for key, shape in filled}

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        """All inputs by name, float64: the image of a model, or the operands of an operator."""
        given = self.info["input"]
        if isinstance(given, dict):
            given = [given] if "name" in given else list(given.values())
        return {entry["name"]: self._filled(entry["name"], entry["shape"]) for entry in given}

    @property
    def image(self) -> Tensor:
        """The only input of a model case, (B, C, H, W), float64."""
        (image,) = self.inputs.values()
        return image

    def scale(self, output: str) -> float:
        """Size of an output, for relative errors: its recorded largest magnitude, else its deviation."""
        largest = self.info.get("output_abs_max", {}).get(output)
        if largest is not None:
            return float(largest)
        deviation = self.expected.get(f"{output}_std")
        return float(self.expected[output].abs().max() if deviation is None else deviation)

    def relative_errors(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative error of each output; a map's covers its subsample, its mean and its deviation.

        Args:
            outputs: Full (not subsampled) outputs under the names of `expected`.

        Raises:
            KeyError: The case holds no output of that name.
        """
        return {name: self._relative_error(name, output) for name, output in outputs.items()}

    def _relative_error(self, name: str, output: Tensor) -> float:
        want, scale = self.expected[name], self.scale(name)
        whole = output.detach().double().cpu()
        is_map = f"{name}_mean" in self.expected
        errors = [relative_error(subsample(whole) if is_map else whole, want, scale)]
        if is_map:
            errors.append(relative_error(whole.mean(), self.expected[f"{name}_mean"], scale))
            errors.append(relative_error(whole.std(correction=0), self.expected[f"{name}_std"], scale))
        return max(errors)

    def _filled(self, name: str, shape: list[int]) -> Tensor:
        return torch.from_numpy(self.fill.filled_array(name, tuple(shape)))

    @property
    def _manifest(self) -> Any:
        return self.info["state_dict"].items()


def load_case(golden_dir: Path, name: str) -> GoldenCase:
    """Reads `<name>.json` and `<name>.npz`; weights and inputs are made when they are first asked for."""
    info = json.loads((golden_dir / f"{name}.json").read_text())
    with np.load(golden_dir / f"{name}.npz") as stored:
        expected = {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}
    return GoldenCase(name, info, expected, _load_module(golden_dir / "fill.py"))


def subsample(x: Tensor) -> Tensor:
    """The part of a (B, C, H, W) map that the golden files store."""
    return x[:, ::5, ::3, ::3]


def relative_error(got: Tensor, want: Tensor, scale: float) -> float:
    """Largest absolute difference divided by `scale`, in float64; infinite where `got` is not finite.

    Raises:
        AssertionError: The shapes differ.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    difference = (got.detach().double().cpu() - want.double().cpu()).abs().max().item() / scale
    return difference if difference == difference else float("inf")


@functools.cache
def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
