"""VWFormer's decoders against the official outputs, the written-out form and the published sizes; checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _golden import GoldenCase, load_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models.vwformer import (
    FORMS,
    VWDecoder,
    VWMultiScaleDecoder,
    checkpoint_filter_fn,
    create_decoder,
)
from vitrail.tools._common.literal_vwformer import literal_decoder

SWIN_T = (96, 192, 384, 768)
GOLDEN = {
    "vwformer_head_swin_t": ("ade20k", {}),
    "vwformer_head_swin_b_nheads8": ("ade20k", {"num_heads": 8}),
    "vwformer_cityhead_convnext_t": ("cityscapes", {}),
    "vwformer_pixel_decoder_maskformer_swin_t": ("maskformer", {}),
    "vwformer_pixel_decoder_mask2former_swin_t": ("mask2former", {}),
}
# Of two runs with differently ordered sums, each is off by its own largest rounding error, on its own machine.
FLOAT32_FACTOR = 3.0
SMALL = {"dim": 64, "out_channels": 64, "low_channels": 8}
SMALL_CHANNELS = (8, 12, 16, 20)


def small_decoder(form: str, **kwargs: object) -> nn.Module:
    """A narrow decoder in float64 whose norms and biases are drawn, so that nothing is hidden behind zeros and ones."""
    model = create_decoder(form, SMALL_CHANNELS, **{"dtype": torch.float64, **SMALL, **kwargs}).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(1 + 0.3 * torch.rand_like(value) if "var" in name else torch.randn_like(value))
    return model


def maps_of(image: tuple[int, int], channels: tuple[int, ...] = SMALL_CHANNELS, batch: int = 1) -> list[Tensor]:
    """What a backbone that rounds up returns for an image."""
    strides = (4, 8, 16, 32)
    sizes = [[-(-side // stride) for side in image] for stride in strides]
    return [torch.randn(batch, n, *size, dtype=torch.float64) for n, size in zip(channels, sizes, strict=True)]


def load_golden(case: GoldenCase, form: str, arguments: dict[str, object], dtype: torch.dtype) -> nn.Module:
    model = create_decoder(form, case.info["constructor"]["in_channels"], dtype=dtype, **arguments).eval()
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(case.weights, model), strict=False)
    # Strict but for the integer counters of batch norm, which the golden files leave out.
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model


def run_golden(case: GoldenCase, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and what the official submodules return, under the golden file's names."""
    decoder = model.decoder if isinstance(model, VWMultiScaleDecoder) else model
    taps = {"linear_fuse": decoder.fuse, "short_path": decoder.short_path, "cat": decoder.merge}
    taps |= {"image_pool": decoder.image_pool, "low_level_fuse": decoder.refine}
    taps |= {f"attn.{i}": layer for i, layer in enumerate(decoder.attentions)}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, shortcut: bool) -> object:
        return lambda _, inputs, out: outputs.update({name: out - inputs[0] if shortcut else out})

    for name, module in taps.items():
        if module is not None:
            module.register_forward_hook(keep(name, getattr(module, "shortcut", False)))
    with torch.no_grad():
        out = model([case.inputs[f"feat{i}"].to(dtype) for i in range(4)])
        if isinstance(model, VWMultiScaleDecoder):
            out, projected = out
            outputs |= {f"proj.{i}": x for i, x in zip((2, 1, 0), projected, strict=True)}
        if "logits" in case.expected:
            weight, bias = (case.weights[f"conv_seg.{kind}"].to(dtype) for kind in ("weight", "bias"))
            return {"logits": F.conv2d(out, weight, bias), **outputs}
    return {"mask_features": out, **outputs}


def golden_errors(case: GoldenCase, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each output, divided by its deviation."""
    errors = {}
    for name, out in outputs.items():
        stored = name if name in ("logits", "mask_features") else _tap_name(case, name)
        if stored is None:
            continue
        steps = (7, 3, 3) if stored == name else (16, 4, 4)
        scale = float(case.expected[f"{stored}_std"])
        errors[name] = max(
            relative_error(out.mean(), case.expected[f"{stored}_mean"], scale),
            relative_error(out.std(correction=0), case.expected[f"{stored}_std"], scale),
        )
        if stored in case.expected:  # attention keeps its windows apart upstream: only mean and deviation are stored
            part = out[:, :: steps[0], :: steps[1], :: steps[2]]
            errors[name] = max(errors[name], relative_error(part, case.expected[stored], scale))
    return errors


def _tap_name(case: GoldenCase, name: str) -> str | None:
    first, *rest = name.split(".")
    names = [f"tap.{name}", ".".join([f"tap.{first}_0", *rest])]  # Mask2Former numbers its stages of attention
    return next((n for n in names if f"{n}_mean" in case.expected), None)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    model = load_golden(case, *GOLDEN[name], torch.float64)
    assert len(case.expected) // 3 > 6
    errors = golden_errors(case, run_golden(case, model, torch.float64))
    stored_taps = {key for key in case.expected if key.endswith("_mean") and "ds." not in key}
    assert len(errors) == len(stored_taps)
    assert max(errors.values()) < 1e-8, errors
    single = run_golden(case, load_golden(case, *GOLDEN[name], torch.float32), torch.float32)
    (output,) = case.info["float32_max_abs_diff"]
    allowed = FLOAT32_FACTOR * case.info["float32_max_abs_diff"][output]
    assert relative_error(single[output][:, ::7, ::3, ::3], case.expected[output], 1.0) < allowed


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_parameters(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    form, arguments = GOLDEN[name]
    model = create_decoder(form, case.info["constructor"]["in_channels"], device="meta", **arguments)
    classifier = sum(torch.Size(s).numel() for k, s in case.info["state_dict"].items() if k.startswith("conv_seg"))
    assert sum(p.numel() for p in model.parameters()) + classifier == case.info["params"]


@settings(max_examples=20)
@given(form=st.sampled_from(list(FORMS)), rows=st.integers(1, 3), columns=st.integers(1, 3), batch=st.integers(1, 2))
def test_equals_the_written_out_form(form: str, rows: int, columns: int, batch: int) -> None:
    model = small_decoder(form)
    decoder = model.decoder if isinstance(model, VWMultiScaleDecoder) else model
    maps = maps_of((64 * rows, 64 * columns), batch=batch)
    with torch.no_grad():
        torch.testing.assert_close(decoder(maps), literal_decoder(decoder, maps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_written_out_form(form: str) -> None:
    # Of two numbers a norm makes constants, whose gradient is lost in rounding: three images, four channels a group.
    model = small_decoder(form, dim=128).train()
    decoder = model.decoder if isinstance(model, VWMultiScaleDecoder) else model
    maps = maps_of((64, 128), batch=3)
    leaves = [*decoder.parameters(), *(x.requires_grad_() for x in maps)]
    out, want = decoder(maps), literal_decoder(decoder, maps)
    grad = torch.randn_like(out)
    for got, exact in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        assert (got - exact).norm() <= 1e-9 * exact.norm() + 1e-12


@settings(max_examples=25)
@given(form=st.sampled_from(list(FORMS)), height=st.integers(1, 150), width=st.integers(1, 150))
def test_takes_images_of_any_size(form: str, height: int, width: int) -> None:
    model, maps = small_decoder(form), maps_of((height, width))
    with torch.no_grad():
        out = model(maps)
    features, *others = (out[0], *out[1]) if isinstance(out, tuple) else (out,)
    assert features.shape == (1, 64, *maps[0].shape[2:])
    assert features.isfinite().all()
    assert [x.shape for x in others] == [(1, 64, *x.shape[2:]) for x in (maps[:0:-1] if others else [])]


@pytest.mark.parametrize(
    ("form", "channels", "classes", "size", "parameters", "published", "measured"),
    [  # GMACs of the head at an image size: published, and of this form
        ("ade20k", SWIN_T, 150, (512, 512), 7_624_726, 33.3, 21.8),
        ("ade20k", SWIN_T, 150, (512, 2048), 7_624_726, 142.9, 96.9),
        ("ade20k", (128, 256, 512, 1024), 150, (640, 640), 7_855_638, 53.2, 37.8),
        ("ade20k", (192, 384, 768, 1536), 150, (640, 640), 8_317_462, 54.0, 38.6),
        ("ade20k", (256, 512, 1024, 2048), 150, (640, 640), 8_779_286, 54.8, 39.5),
        ("cityscapes", SWIN_T, 19, (512, 1024), 7_032_259, 63.9, 43.0),
        ("cityscapes", (128, 256, 512, 1024), 19, (512, 1024), 7_263_171, 64.4, 43.6),
        ("cityscapes", (192, 384, 768, 1536), 19, (512, 1024), 7_724_995, 65.5, 44.6),
        ("cityscapes", (256, 512, 1024, 2048), 19, (512, 1024), 8_186_819, 66.5, 45.6),
        ("cityscapes", SWIN_T, 19, (1024, 2048), 7_032_259, 294.2, 210.8),
    ],
)
def test_size_and_cost(
    form: str,
    channels: tuple[int, ...],
    classes: int,
    size: tuple[int, int],
    parameters: int,
    published: float,
    measured: float,
) -> None:
    with torch.device("meta"):
        decoder, classifier = create_decoder(form, channels).eval(), nn.Conv2d(512, classes, 1)
        maps = [x.float() for x in maps_of(size, channels)]
        counts = []
        for function in (decoder, lambda maps: literal_decoder(decoder, maps)):
            with FlopCounterMode(display=False) as counter:
                classifier(function(maps))
            counts.append(counter.get_total_flops() / 2e9)
    modules = (*decoder.parameters(), *classifier.parameters())
    assert sum(p.numel() for p in modules) == parameters
    assert counts[1] == pytest.approx(published, abs=0.06)
    assert counts[0] == pytest.approx(measured, abs=0.06)


def official_layout(model: nn.Module, form: str) -> dict[str, Tensor]:
    """The weights of `model` under the official names and in the official shapes."""
    multi_scale = isinstance(model, VWMultiScaleDecoder)
    decoder = model.decoder if multi_scale else model
    stage = "_0" if multi_scale else ""
    detectron = form.startswith("mask")
    own, official = decoder.state_dict(), {}

    def put(name: str, ours: str, weight: Tensor | None = None, tied: bool = False) -> None:
        keys = {"weight": own[f"{ours}.weight"] if weight is None else weight}
        official.update({f"{name}.{kind}" if detectron else f"{name}.conv.{kind}": w for kind, w in keys.items()})
        norm = "tied_norm." if tied else f"{ours.split('.conv')[0]}.norm."
        renamed = f"{name}.norm." if detectron else f"{name}.bn."
        official.update({renamed + k[len(norm) :]: v for k, v in own.items() if k.startswith(norm)})

    for i in range(1, 5):
        if form == "ade20k":
            official[f"linear_c{i}.proj.weight"] = own[f"project{i}.weight"].flatten(1)
            official[f"linear_c{i}.proj.bias"] = own[f"project{i}.bias"]
        else:
            put(f"linear_c{i}", f"project{i}.conv", tied=detectron and i > 1)
    put("linear_fuse", "fuse", _whole(own, "fuse"), tied=detectron)
    put(f"cat{stage}", "merge", _whole(own, "merge"), tied=detectron)
    put("low_level_fuse", "refine", _whole(own, "refine"))
    put(f"short_path{stage}", "short_path.conv", tied=detectron)
    if decoder.image_pool is not None:
        put(f"image_pool{stage}.1", "image_pool.conv", tied=detectron)
    for k in range(len(decoder.attentions)):
        ours, ds, attn = f"attentions.{k}", f"ds{stage}.{k}", f"attn{stage}.{k}"
        for kind in ("weight", "bias"):
            if f"{ours}.reduce.{kind}" in own:
                official[f"{ds}.{kind}" if detectron else f"{ds}.conv.{kind}"] = own[f"{ours}.reduce.{kind}"]
        norm = f"{ours}.reduce_norm."
        infix = "norm" if detectron else "bn"
        official.update({f"{ds}.{infix}.{k[len(norm) :]}": v for k, v in own.items() if k.startswith(norm)})
        key, value = own[f"{ours}.kv.weight"].permute(0, 2, 3, 1).flatten(1).chunk(2)
        key_bias, value_bias = own[f"{ours}.kv.bias"].chunk(2)
        query, query_bias = own[f"{ours}.q.weight"].flatten(1), own[f"{ours}.q.bias"]
        if form == "ade20k":
            for name, weight, bias in (
                ("theta", query, query_bias),
                ("phi", key, key_bias),
                ("g", value, value_bias),
            ):
                official[f"{attn}.{name}.conv.weight"] = weight[:, :, None, None]
                official[f"{attn}.{name}.conv.bias"] = bias
            official[f"{attn}.conv_out.conv.weight"] = own[f"{ours}.proj.weight"]
            norm = f"{ours}.norm."
            official.update({f"{attn}.conv_out.bn.{k[len(norm) :]}": v for k, v in own.items() if k.startswith(norm)})
        else:
            official[f"{attn}.in_proj_weight"] = torch.cat((query, key, value))
            official[f"{attn}.in_proj_bias"] = torch.cat((query_bias, key_bias, value_bias))
            official[f"{attn}.out_proj.weight"] = own[f"{ours}.proj.weight"].flatten(1)
            official[f"{attn}.out_proj.bias"] = own[f"{ours}.proj.bias"]
    if multi_scale:
        for key, value in model.projections.state_dict().items():
            official[f"proj.{key.replace('.conv.', '.')}"] = value
    return official


def _whole(own: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([value for key, value in own.items() if key.startswith(f"{name}.convs.")], 1)


PREFIX = {
    "ade20k": "decode_head.",
    "cityscapes": "decode_head.",
    "maskformer": "sem_seg_head.pixel_decoder.",
    "mask2former": "sem_seg_head.pixel_decoder.",
}


@pytest.mark.parametrize("whole", [False, True], ids=["decoder", "segmenter"])
@pytest.mark.parametrize("form", FORMS)
def test_official_checkpoints_load(form: str, whole: bool) -> None:
    source, target = small_decoder(form), small_decoder(form)
    official = official_layout(source, form)
    assert not any(key.startswith("project1.") for key in official)
    if whole:
        official = {PREFIX[form] + key: value for key, value in official.items()}
        official |= {"backbone.norm.weight": torch.ones(3), PREFIX[form] + "conv_seg.weight": torch.ones(3)}
        official = {"state_dict" if form in ("ade20k", "cityscapes") else "model": official}
    target.load_state_dict(checkpoint_filter_fn(official, target))
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("form", FORMS)
def test_official_names_are_those_of_the_golden_files(golden_dir: Path, form: str) -> None:
    name, arguments = next((n, a) for n, (f, a) in GOLDEN.items() if f == form)
    case = load_case(golden_dir, name)
    model = create_decoder(form, SWIN_T, device="meta", **arguments)
    ours = {key: list(value.shape) for key, value in official_layout(model, form).items()}
    aliases = case.info["shared_tensors"]
    theirs = case.info["state_dict"] | {alias: case.info["state_dict"][key] for alias, key in aliases.items()}
    theirs |= {key: [] for key in case.info["skipped"]}
    assert ours == {key: shape for key, shape in theirs.items() if not key.startswith("conv_seg")}


@pytest.mark.parametrize("form", FORMS)
def test_own_checkpoints_pass_unchanged_in_any_order(form: str) -> None:
    model = small_decoder(form)
    own = dict(reversed(model.state_dict().items()))
    filtered = checkpoint_filter_fn(own, model)
    assert list(filtered) == list(own)
    assert all(filtered[key] is own[key] for key in own)


def test_wrong_checkpoints_are_named() -> None:
    model = small_decoder("maskformer")
    official = official_layout(model, "maskformer")
    missing = {k: v for k, v in official.items() if k != "attn.1.in_proj_bias"}
    with pytest.raises(RuntimeError, match=r"Missing.*attentions\.1\.q\.bias.*attentions\.1\.kv\.bias"):
        model.load_state_dict(checkpoint_filter_fn(missing, model))
    with pytest.raises(RuntimeError, match=r"Unexpected.*adapter_1\.weight"):
        model.load_state_dict(checkpoint_filter_fn({**official, "adapter_1.weight": torch.ones(2)}, model))
    untied = {**official, "cat.norm.bias": official["cat.norm.bias"] + 1}
    with pytest.raises(ValueError, match=r"cat\.norm\.bias differs"):
        checkpoint_filter_fn(untied, model)
    with pytest.raises(ValueError, match=r"merge takes 320 channels.*\[64, 64, 64, 64\]"):
        checkpoint_filter_fn(official_layout(small_decoder("ade20k"), "ade20k"), small_decoder("cityscapes"))


def test_seven_convolutions_share_one_norm() -> None:
    decoder = small_decoder("maskformer")
    norms = [module for module in decoder.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 2
    uses = []
    decoder.tied_norm.register_forward_hook(lambda *_: uses.append(1))
    decoder(maps_of((64, 64)))
    assert len(uses) == 7
    assert len({p.data_ptr() for p in decoder.parameters()}) == len(decoder.state_dict(keep_vars=True)) - sum(
        1 for _ in decoder.buffers()
    )


@pytest.mark.parametrize("form", FORMS)
def test_trains_in_half_precision(form: str) -> None:
    model = create_decoder(form, SMALL_CHANNELS, **SMALL).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model([x.float() for x in maps_of((70, 90), batch=2)])
    parts = (out[0], *out[1]) if isinstance(out, tuple) else (out,)
    sum(x.float().square().mean() for x in parts).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not idle


def test_initial_weights() -> None:
    emptied = create_decoder("ade20k", SWIN_T, device="meta").to_empty(device="cpu")
    for parameter in emptied.parameters():
        nn.init.constant_(parameter, float("nan"))
    emptied.init_weights()
    assert all(p.isfinite().all() for p in emptied.parameters())
    assert not any(layer.norm.weight.any() for layer in emptied.attentions)
    assert emptied.merge.convs[0].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert emptied.attentions[0].q.weight.std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("form", "channels", "kwargs", "message"),
    [
        ("ade", SMALL_CHANNELS, {}, "form is 'ade'; allowed: ade20k"),
        ("ade20k", (8, 16, 32), {}, r"in_channels is \[8, 16, 32\]"),
        ("ade20k", SMALL_CHANNELS, {"mode": "bicubic"}, "mode is 'bicubic'"),
        ("ade20k", SMALL_CHANNELS, {"out_channels": 0}, "out_channels is 0"),
        ("ade20k", SMALL_CHANNELS, {"dim": 48}, "dim 48"),
        ("cityscapes", SMALL_CHANNELS, {"num_heads": 5}, "num_heads 5"),
    ],
)
def test_bad_arguments_are_named(form: str, channels: tuple[int, ...], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_decoder(form, channels, device="meta", **kwargs)


def test_unknown_arguments_raise() -> None:
    with pytest.raises(TypeError, match="norm_layer"):
        VWDecoder(SMALL_CHANNELS, norm_layer=nn.BatchNorm2d)
