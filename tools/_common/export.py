"""Writes a model as a file for another runtime and compares what that file computes with the model itself.

Operators run on their eager reference while the graph is recorded, so that it holds standard operators only: the file
needs neither vitrail nor Triton. ONNX and TorchScript files come from `torch.jit.trace`, in which the references pad
always; thereby one graph serves every size. `torch.export` proves sizes symbolically, which it can for multiples of a
unit that leaves nothing to pad.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrail.kernels._common.dispatch import settings
from vitrail.kernels.routing_attention.reference import region_similarities, region_size
from vitrail.layers.routing import RoutingAttention
from vitrail.tools._common.cli import ToolError

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "exported-program": ".pt2"}
OPSET = 17
TOLERANCE = 1e-4
_MOST_UNITS = 64
_IDLE = 1e-3
Runner = Callable[[Tensor], Tensor]


class Check(NamedTuple):
    """One comparison of a file with the model.

    Attributes:
        shape: Of the image batch, (B, C, H, W).
        error: Largest absolute difference of the outputs.
        relative: `error` over the largest change of the model's output from that for a blank image.
        note: Why the images are not the first ones that were drawn, if they are not.
    """

    shape: tuple[int, int, int, int]
    error: float
    relative: float
    note: str = ""


def require_packages(export_format: str) -> None:
    """Raises `ToolError` where a package is missing that writing or checking the format needs."""
    needed = ("onnx", "onnxruntime") if export_format == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(
            f"--format {export_format} needs {' and '.join(missing)}: install the extra: pip install 'vitrail[onnx]'"
        )


def wake_idle_parts(model: nn.Module, channels: int = 3) -> None:
    """Makes every part of a model with random weights count, so that comparing a file with it compares all parts.

    Parameters that start at zero or next to it, such as biases, offsets and layer scales, get random values; batch
    normalisation gets the statistics of a few images, without which the signal would fade from layer to layer.

    Args:
        model: A classifier in eval mode; changed in place.
        channels: Of its images.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < _IDLE:
                parameter.normal_(std=0.05)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0  # what one batch has becomes the statistics
    if norms:
        with torch.no_grad(), _eager_operators():
            model(_make_images((4, channels, 96, 96), torch.Generator().manual_seed(1)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _make_images(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Images that differ in colour, in large patterns and in every pixel; noise alone is the same when pooled."""
    batch, channels = shape[:2]
    colour = torch.randn(batch, channels, 1, 1, generator=generator)
    pattern = torch.randn(batch, channels, 4, 4, generator=generator)
    grain = torch.randn(tuple(shape), generator=generator)
    return colour + nn.functional.interpolate(pattern, tuple(shape[2:]), mode="bilinear") + 0.5 * grain


def write_model(
    model: nn.Module, path: Path, export_format: str, size: tuple[int, int, int], dynamic: bool, batch_size: int = 2
) -> None:
    """Writes `model`, in eval mode on the CPU, as a file.

    Args:
        model: From images (B, C, H, W) to one tensor.
        path: The file; replaced if it exists.
        export_format: One of `FORMATS`.
        size: Channels, height and width of the image with which the graph is recorded.
        dynamic: Let batch, height and width vary; otherwise the file takes the one shape.
        batch_size: Images in the recorded batch, at least 2 if dynamic: a batch of one would be taken for a constant.

    Raises:
        ToolError: PyTorch cannot record or convert the model.
    """
    writers = {"onnx": _write_onnx, "torchscript": _write_torchscript, "exported-program": _write_program}
    image = torch.zeros(batch_size, *size)
    try:
        with torch.no_grad(), _eager_operators(), warnings.catch_warnings():
            # Checks of sizes look like branches to the tracer; `verify_file` shows that they are none.
            warnings.simplefilter("ignore")
            writers[export_format](model, path, image, dynamic)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ToolError(f"--format {export_format} cannot hold this model at {size[1]} x {size[2]}: {first}") from error


def verify_file(model: nn.Module, path: Path, export_format: str, shapes: Sequence[tuple[int, ...]]) -> list[Check]:
    """Runs the file and the model on the same made-up images, one batch of each shape.

    Routing chooses regions, and where two are as similar as float32 can tell, runtimes that round differently choose
    different ones. Where a file differs and `find_tied_routes` shows such images, it is compared on others, once.

    Raises:
        ToolError: The file cannot be run on one of the shapes.
    """
    readers = {"onnx": _read_onnx, "torchscript": _read_torchscript, "exported-program": _read_program}
    run = readers[export_format](path)
    generator = torch.Generator().manual_seed(0)
    checks = []
    for shape in shapes:
        image = _make_images(shape, generator)
        check = _compare(model, run, image)
        if check.relative > TOLERANCE and (tied := find_tied_routes(model, image)):
            others = _make_images(shape, torch.Generator().manual_seed(1))
            check = _compare(model, run, others)._replace(
                note=f"input reseeded: {tied}, and the file differs by {check.relative:.1e}"
            )
        checks.append(check)
    return checks


def _compare(model: nn.Module, run: Runner, image: Tensor) -> Check:
    """The file's output for one batch of images beside the model's."""
    with torch.no_grad(), _eager_operators():
        expected = model(image)
        signal = (expected - model(torch.zeros_like(image[:1]))).abs().max().item()
        try:
            given = run(image)
        except Exception as error:  # each runtime has exceptions of its own, onnxruntime derives them from this
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ToolError(f"the file does not run on a batch of {_times(image.shape)}: {first}") from error
    difference = (given - expected).abs().max().item()
    batch, channels, height, width = image.shape
    return Check((batch, channels, height, width), difference, difference / max(signal, 1e-30))


def find_tied_routes(model: nn.Module, image: Tensor) -> str:
    """Where the model's routes are open within rounding: a description of the first layer, or nothing.

    The rounding of a layer's similarities is what float32 and float64 differ by. A choice is open where a chosen region
    leads one that is not by less than twice that, in float64. Regions of padding alone hold the same: which of them is
    chosen does not matter, nor do the routes that they have.
    """
    exact = _similarities(copy.deepcopy(model).double(), image.double())
    rounded = _similarities(model, image)
    for name, (similarity, is_real, topk) in exact.items():
        gap = _least_lead(similarity, is_real, topk)
        rounding = (rounded[name][0] - similarity).abs().max().item()
        if gap <= 2 * rounding:
            return f"routes of {name} tie within rounding at a gap of {gap:.1e}, rounding {rounding:.1e}"
    return ""


def _similarities(model: nn.Module, image: Tensor) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Of each routed layer the similarities of its regions (B, R, R), which regions are real (R,), and its top-k."""
    found: dict[str, tuple[Tensor, Tensor, int]] = {}

    def record(name: str, layer: RoutingAttention, x: Tensor) -> None:
        grid, (height, width) = layer.n_regions, x.shape[1:3]
        q, k, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(3)
        pad_q, pad_k, _ = layer.qkv.bias.view(3, layer.num_heads, layer.head_dim).unbind(0)
        size, _ = region_size(height, width, grid)
        rows, columns = (torch.arange(n) * step for n, step in zip(grid, size, strict=True))
        is_real = (rows < height)[:, None] & (columns < width)[None, :]
        found[name] = region_similarities(q, k, pad_q, pad_k, grid), is_real.flatten(), layer.topk

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, RoutingAttention)]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: record(name, module, inputs[0]))
        for name, module in layers
    ]
    try:
        with torch.no_grad(), _eager_operators():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _least_lead(similarity: Tensor, is_real: Tensor, topk: int) -> float:
    """Least lead of a chosen region over one that is not, of which one at least is real, for any real region."""
    is_chosen = torch.zeros_like(similarity, dtype=torch.bool)
    is_chosen.scatter_(-1, similarity.topk(topk, dim=-1).indices, True)
    last, last_real = (
        similarity.masked_fill(~mask, math.inf).amin(-1)[:, is_real] for mask in (is_chosen, is_chosen & is_real)
    )
    first, first_real = (
        similarity.masked_fill(~mask, -math.inf).amax(-1)[:, is_real] for mask in (~is_chosen, ~is_chosen & is_real)
    )
    return torch.minimum(last_real - first, last - first_real).min().item()


def dynamic_unit(model: nn.Module) -> int:
    """Pixels of which height and width must be multiples so that no stage of the model pads anything."""
    info = model.feature_info
    reductions = [stage["reduction"] for stage in info]
    unit = math.lcm(*reductions)
    for name, module in model.named_modules():
        tiles = getattr(module, "window_size", None) or getattr(module, "n_regions", None)
        stage = next((i for i, entry in enumerate(info) if f"{name}.".startswith(f"{entry['module']}.")), None)
        if tiles is not None and stage is not None:
            unit = math.lcm(unit, *(reductions[stage] * tile for tile in tiles))
    return unit


def least_size(model: nn.Module, export_format: str) -> int:
    """Least height and width for which a dynamic file is right.

    Windows that shrink to small maps are recorded as they are on large ones.
    """
    if export_format == "exported-program":
        return 2 * dynamic_unit(model)
    least = 1
    for stage in model.feature_info:
        for _, module in model.get_submodule(stage["module"]).named_modules():
            if hasattr(module, "grow_to_divisor"):
                least = max(least, stage["reduction"] * max(module.window_size) + 1)
    return least


def shapes_to_try(
    model: nn.Module, export_format: str, size: tuple[int, int, int], dynamic: bool, batch_size: int
) -> list[tuple[int, int, int, int]]:
    """Shapes at which a file is compared: the one that it takes, or two batch sizes at two sizes."""
    channels, height, width = size
    if not dynamic:
        return [(batch_size, channels, height, width)]
    if export_format == "exported-program":
        unit = dynamic_unit(model)
        sizes = [(2 * unit, 2 * unit), (2 * unit, 3 * unit)]
    else:
        # The second size is no multiple of anything, and not square.
        sizes = [(height, width), (height + 19, width + 37)]
    return [(batch, channels, *pixels) for pixels in sizes for batch in (1, 3)]


@contextmanager
def _eager_operators() -> Iterator[None]:
    """Lets all operators run on their references, which consist of standard operators."""
    before = settings.default_backend
    settings.default_backend = "eager"
    try:
        yield
    finally:
        settings.default_backend = before


def _write_onnx(model: nn.Module, path: Path, image: Tensor, dynamic: bool) -> None:
    import onnx

    axes = {"image": {0: "batch", 2: "height", 3: "width"}, "output": {0: "batch"}} if dynamic else None
    torch.onnx.export(
        model,
        (image,),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["output"],
        dynamic_axes=axes,
    )
    onnx.checker.check_model(str(path))


def _write_torchscript(model: nn.Module, path: Path, image: Tensor, dynamic: bool) -> None:
    torch.jit.save(torch.jit.trace(model, (image,), check_trace=False), str(path))


def _write_program(model: nn.Module, path: Path, image: Tensor, dynamic: bool) -> None:
    shapes = None
    if dynamic:
        unit = dynamic_unit(model)
        image = image.new_zeros(len(image), image.shape[1], 2 * unit, 3 * unit)
        # One unit would be a single window on the last map, which is proven apart.
        height, width = (unit * torch.export.Dim(name, min=2, max=_MOST_UNITS) for name in ("rows", "columns"))
        shapes = ({0: torch.export.Dim("batch", max=4096), 2: height, 3: width},)
    torch.export.save(torch.export.export(model, (image,), dynamic_shapes=shapes), path)


def _read_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _read_torchscript(path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # recent versions of PyTorch advise torch.export
        return torch.jit.load(str(path), map_location="cpu")


def _read_program(path: Path) -> Runner:
    return torch.export.load(path).module()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
