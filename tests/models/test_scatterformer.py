"""ScatterFormer: the authors' outputs, scans of every kind, checkpoints, registration."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from _golden import GoldenCase, load_case, relative_error
from torch import Tensor

import vitrail
from vitrail.layers.scattered import CrossWindowFeedForward, ScatteredLinearAttention
from vitrail.layers.voxels import SparseTensor
from vitrail.models.scatterformer import Block, ScatterFormer, checkpoint_filter_fn

NAMES = ("scatterformer_kitti", "scatterformer_kitti_n", "scatterformer_nuscenes", "scatterformer_waymo")
EXACT = 1e-8


def golden_voxels(case: GoldenCase, dtype: torch.dtype = torch.float64) -> SparseTensor:
    """Input of a case, by the rule that its json states in words."""
    fine = case.fill.filled_array("voxels", (2, 32, 128, 128)) > 1.55
    coarse = case.fill.filled_array("clusters", (2, 4, 16, 16)) > 1.4
    coarse = torch.from_numpy(coarse).repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    coords = (torch.from_numpy(fine) & coarse).nonzero()
    assert len(coords) == case.info["input"]["voxels"]
    features = case.inputs["features"].to(dtype)
    return SparseTensor.from_coords(features, coords, (32, 128, 128), 2)


def check_rows(case: GoldenCase, got: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Compares (whole output, its stored part) with the case; float32 with what its json records for float32."""
    recorded = case.info["float32_max_abs_diff_by_output"]
    for name, (whole, part) in got.items():
        want, scale = case.expected[name], float(case.expected.get(f"{name}_std", case.expected[name].std()))
        # The largest of many rounding errors: sums in another order have one of the same size, not the same one.
        limit = EXACT if dtype == torch.float64 else 2 * recorded[name] / scale
        assert relative_error(part, want, scale) < limit, name
        if f"{name}_mean" in case.expected:
            assert relative_error(whole.mean(), case.expected[f"{name}_mean"], scale) < limit, name
            assert relative_error(whole.std(correction=0), case.expected[f"{name}_std"], scale) < limit, name


dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@dtypes
def test_attention_equals_the_authors(golden_dir: Path, dtype: torch.dtype) -> None:
    case = load_case(golden_dir, "scatterformer_sla")
    x = golden_voxels(case, dtype)
    layer = ScatteredLinearAttention(128, 4, 12, dtype=dtype)
    layer.load_state_dict(case.weights)
    features = x.features.requires_grad_()
    out = layer(features, x.sites)
    grad = torch.from_numpy(case.fill.filled_array("grad_output", tuple(out.shape))).to(dtype)
    leaves = {"features": features, "qkv": layer.qkv.weight, "proj": layer.proj.weight, "proj_bias": layer.proj.bias}
    d = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    windows = x.sites.windows(12)
    _, k, v = layer.qkv(features)[windows.order.long()].unflatten(1, (3, 4, 32)).unbind(1)
    starts, window, counts = windows.starts.unique(return_inverse=True, return_counts=True)
    assert torch.equal(counts, case.expected["window_counts"].long())
    assert len(starts) == case.info["occupied_windows"]
    pairs = k.relu()[..., None] * v[..., None, :]
    kv = pairs.new_zeros(len(starts), 4, 32, 32).index_add(0, window, pairs)
    k_sum = k.new_zeros(len(starts), 4, 32).index_add(0, window, k.relu())
    outputs = {
        "out": (out, out[::5, ::3]),
        "k_sum": (k_sum, k_sum[::3]),
        "kv": (kv, kv[::13]),
        "grad_features": (d["features"], d["features"][::7, ::5]),
        "grad_qkv": (d["qkv"], d["qkv"][::11, ::5]),
        "grad_proj": (d["proj"], d["proj"][::7, ::5]),
        "grad_proj_bias": (d["proj_bias"], d["proj_bias"]),
    }
    check_rows(case, outputs, dtype)


def part_of(model: torch.nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Loads the official weights of a part of the model through the filter that whole checkpoints go through."""
    model.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()}, strict=False)
    missing = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    assert missing == {key.removeprefix(prefix) for key in weights}


@dtypes
def test_mixer_equals_the_authors(golden_dir: Path, dtype: torch.dtype) -> None:
    case = load_case(golden_dir, "scatterformer_cwi")
    x = golden_voxels(case, dtype)
    layer = CrossWindowFeedForward(128, 13, dtype=dtype).eval()
    official = {f"stage1.0.cffn_layers.0.{key}": value for key, value in case.weights.items()}
    part_of(layer, checkpoint_filter_fn(official, layer), "stages.0.blocks.0.mixer.")
    out = layer(x.features, x.sites)
    check_rows(case, {"out": (out, out[::5, ::3])}, dtype)
    assert sum(p.numel() for p in layer.parameters()) == case.info["params"]


@dtypes
def test_block_equals_the_authors(golden_dir: Path, dtype: torch.dtype) -> None:
    case = load_case(golden_dir, "scatterformer_block")
    x = golden_voxels(case, dtype)
    block = Block(128, 4, 12, 13, dtype=dtype).eval()
    official = {f"stage1.0.{key}": value for key, value in case.weights.items()}
    part_of(block, checkpoint_filter_fn(official, block), "stages.0.blocks.0.")
    out = block(x.features, x.sites)
    check_rows(case, {"out": (out, out[::5, ::3])}, dtype)


@dtypes
def test_backbone_equals_the_authors(golden_dir: Path, dtype: torch.dtype) -> None:
    case = load_case(golden_dir, "scatterformer_backbone")
    box = {"low": (0.0, 0.0, 0.0), "high": (128.0, 128.0, 32.0), "voxel_size": (1.0, 1.0, 1.0)}
    model = timm.create_model("scatterformer_waymo", **box, dtype=dtype).eval()
    weights = checkpoint_filter_fn({f"backbone_3d.{key}": value for key, value in case.weights.items()}, model)
    loaded = model.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    assert all("num_batches_tracked" in key or key.startswith("encoder.") for key in loaded.missing_keys)
    with torch.no_grad():
        found = model.forward_voxels(golden_voxels(case, dtype))
        bev = model.pool(found[-1])
    outputs = {"bev": (bev, bev[:, ::5, ::3, ::3])}
    for name, x in zip(("cpe", "stage1", "stage2"), found, strict=True):
        assert len(x.sites) == case.info["active_voxels"][name]
        dense = x.dense()
        assert list(dense.shape) == case.info["dense_shapes"][name]
        outputs[name] = (dense, dense[:, ::17, ::3, ::5, ::5])
    check_rows(case, outputs, dtype)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("encoder."))
    assert backbone == case.info["params"]


def tiny(**kwargs: object) -> ScatterFormer:
    """Two stages on a small grid: 8 x 16 x 16 voxels (z, y, x)."""
    box = {"low": (0.0, 0.0, 0.0), "high": (16.0, 16.0, 8.0), "voxel_size": (1.0, 1.0, 1.0)}
    sizes = {"voxel_dim": 8, "dim": 16, "num_heads": 2, "stem_depth": 1, "depths": (1, 1), "window_size": 4}
    return ScatterFormer(**{**box, **sizes, "pool_heads": 2, **kwargs})


def draw_scans(*counts: int) -> list[Tensor]:
    return [torch.rand(n, 4) * torch.tensor([16.0, 16.0, 8.0, 1.0]) for n in counts]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("counts", [(0,), (1,), (0, 200), (300, 0, 1)], ids=str)
def test_scans_of_any_size(counts: tuple[int, ...], training: bool) -> None:
    model = tiny().train(training)
    bev = model(draw_scans(*counts))
    assert bev.shape == (len(counts), 16, 8, 8)
    assert bev.isfinite().all()
    for image, count in zip(bev, counts, strict=True):
        assert image.any() == (count > 0)
    bev.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_scans_of_a_batch_do_not_mix_and_order_does_not_matter() -> None:
    model = tiny(dtype=torch.float64).eval()
    scans = [scan.double() for scan in draw_scans(150, 90)]
    together = model(scans)
    for index, scan in enumerate(scans):
        alone = model([scan[torch.randperm(len(scan))]])
        torch.testing.assert_close(together[index], alone[0])


def test_broken_and_distant_points_change_nothing() -> None:
    model = tiny().eval()
    (scan,) = draw_scans(100)
    others = torch.tensor([[float("nan"), 1, 1, 1], [1, 1, 1, float("inf")], [16.0, 1, 1, 1], [1, -0.01, 1, 1]])
    assert torch.equal(model([scan]), model([torch.cat((others, scan))]))


def test_a_point_lights_the_cell_where_it_stands() -> None:
    model = tiny().eval()
    bev = model([torch.tensor([[13.5, 4.5, 3.5, 0.3]])])
    cells = bev[0].abs().sum(0).nonzero()
    # Submanifold convolutions stay in place; the strided one reaches one cell further from odd voxels.
    assert cells.tolist() == [[2, 6], [2, 7]]


def test_all_parameters_learn() -> None:
    model = tiny().train()
    (model(draw_scans(400, 300)) * torch.randn(2, 16, 8, 8)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A shift of all keys of a pillar cancels in the softmax, so only part of the bias learns.
    assert without == []


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny(dtype=torch.float64).eval()
    scans = [scan.double() for scan in draw_scans(200)]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(scans).square().sum(), list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", NAMES)
def test_variants_are_registered(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert name in vitrail.list_models("scatterformer_*")
    assert model.pretrained_cfg["architecture"] == name
    assert model.map_size[0] % 4 == model.map_size[1] % 4 == 0
    groups = model.group_matcher()
    assert set(groups) == {"stem", "blocks"}
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "encoder", "backbone", "map_size"),
    [
        ("scatterformer_waymo", 4_640, 4_241_856, (240, 240)),
        ("scatterformer_nuscenes", 4_640, 4_245_184, (180, 180)),
    ],
)
def test_sizes_are_those_of_the_authors(name: str, encoder: int, backbone: int, map_size: tuple[int, int]) -> None:
    model = timm.create_model(name, device="meta")
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts["encoder"] == encoder
    assert sum(counts.values()) - encoder == backbone
    assert model.map_size == map_size


def test_checkpoint_of_a_whole_detector_gives_its_backbone() -> None:
    model, other = tiny(), tiny()
    inverse = {"encoder.layers.": "vfe.pfn_layers."}
    official = {}
    for key, value in model.state_dict().items():
        for ours, theirs in inverse.items():
            if key.startswith(ours):
                official[theirs + key.removeprefix(ours)] = value
        if not key.startswith("encoder."):
            official[f"backbone_3d.{key}"] = value
    official["dense_head.heads_list.0.hm.weight"] = official["backbone_2d.layers.0.weight"] = torch.zeros(1)
    other.load_state_dict(checkpoint_filter_fn({"model_state": {**official, "global_step": torch.zeros(1)}}, other))
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_own_checkpoints_pass_unchanged() -> None:
    weights = tiny().state_dict()
    assert checkpoint_filter_fn({"state_dict": weights}, tiny()).keys() == weights.keys()


def test_autocast_stays_close() -> None:
    model = tiny().eval()
    scans = draw_scans(300)
    with torch.no_grad():
        want = model(scans)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(scans)
    assert relative_error(got.float(), want, float(want.std())) < 0.1


def test_same_forward_on_a_scan_of_kitti(data_dir: Path) -> None:
    scan = torch.from_numpy(np.fromfile(data_dir / "pointclouds/kitti/velodyne_reduced/000000.bin", np.float32))
    model = timm.create_model("scatterformer_kitti_n").eval()
    with torch.no_grad():
        bev = model([scan.view(-1, 4)])
    assert bev.shape == (1, 64, 100, 88)
    assert bev.isfinite().all()
    assert 0.02 < bev.any(1).float().mean() < 0.9


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's gradient of an embedding adds up in any order else."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_model_is_the_eager_one(training: bool) -> None:
    model = tiny(dim=64, high=(64.0, 64.0, 8.0)).cuda().train(training)
    scans = [scan.cuda() * torch.tensor([4.0, 4.0, 1.0, 1.0], device="cuda") for scan in draw_scans(9000, 0, 4000)]
    results = []
    for copy, dtype in ((model, torch.float32), (model, torch.float32), (deepcopy(model).double(), torch.float64)):
        bev = copy([scan.to(dtype) for scan in scans])
        results.append((bev, *torch.autograd.grad(bev.square().mean(), list(copy.parameters()))))
    for ours, again, exact in zip(*results, strict=True):
        assert torch.equal(ours, again)
        assert (ours - exact).norm() <= 1e-3 * exact.norm() + 1e-6


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_classes is 3"):
        timm.create_model("scatterformer_kitti_n", num_classes=3)
    with pytest.raises(NotImplementedError, match="features_only"):
        timm.create_model("scatterformer_kitti_n", features_only=True)
    with pytest.raises(ValueError, match="depths is"):
        tiny(depths=(1, 0))
    with pytest.raises(ValueError, match="too small"):
        tiny(high=(16.0, 16.0, 1.0))
    with pytest.raises(TypeError, match="windows"):
        tiny(windows=3)
    with pytest.raises(ValueError, match=r"expected \(P, 4\)"):
        tiny()([torch.zeros(3, 5)])
