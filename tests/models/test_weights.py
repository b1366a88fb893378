"""Pretrained weights from a server, a folder or the Hub into `timm.create_model(..., pretrained=True)`."""

from __future__ import annotations

import argparse
import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from _weights_server import Site, serve
from PIL import Image
from timm.models import PretrainedCfg

import vitrail
from vitrail.models import _fetch, _weights
from vitrail.models._registry import configurations, is_shipped
from vitrail.models._weights import WeightsError, convert, locate, read_checkpoint, select_weights

SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (16, 32), "num_heads": (1, 2)}
NAME = "davit_t"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VITRAIL_WEIGHTS_URL", "VITRAIL_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_fetch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def source() -> torch.nn.Module:
    return timm.create_model(NAME, num_classes=10, **SMALL).eval()


def stored(model: torch.nn.Module, path: Path) -> bytes:
    """A model's file as bytes, in the format that the ending names."""
    if path.suffix == ".safetensors":
        return safetensors.torch.save(model.state_dict())
    torch.save({"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    return path.read_bytes()


def create(url: str = "", **kwargs: Any) -> torch.nn.Module:
    cfg = {**timm.get_pretrained_cfg(NAME).to_dict(), "url": url, "hf_hub_id": None, "tag": "t", "num_classes": 10}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg=cfg, **{"num_classes": 10, **SMALL, **kwargs}).eval()


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_weights_are_fetched_verified_cached_and_loaded(
    tmp_path: Path, source: torch.nn.Module, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = stored(source, tmp_path / file)
    name = f"w-{hashlib.sha256(content).hexdigest()[:8]}.{file.partition('.')[2]}"
    image = torch.rand(1, 3, 64, 64)
    site = Site({f"/{name}": content}, cut_after=[1000])
    with serve(site) as url:
        model = create(f"{url}/{name}", cache_dir=tmp_path / "cache")
        torch.testing.assert_close(model(image), source(image))
        assert model.pretrained_cfg["url"] == f"{url}/{name}"
        assert "file" not in model.pretrained_cfg
        assert (tmp_path / "cache" / name).read_bytes() == content
        fetched = len(site.requests)
        monkeypatch.setenv("VITRAIL_OFFLINE", "1")
        torch.testing.assert_close(create(f"{url}/{name}", cache_dir=tmp_path / "cache")(image), source(image))
        assert len(site.requests) == fetched
        with pytest.raises(WeightsError, match="network is switched off"):
            create(f"{url}/{name}", cache_dir=tmp_path / "other")


def test_channels_classes_and_features_are_adapted(tmp_path: Path, source: torch.nn.Module) -> None:
    with serve(Site({"/w.safetensors": stored(source, tmp_path / "w.safetensors")})) as url:
        gray = create(f"{url}/w.safetensors", in_chans=1, num_classes=7)
        maps = create(f"{url}/w.safetensors", features_only=True, out_indices=(0, 1))
    first = source.state_dict()["stem.conv.weight"]
    torch.testing.assert_close(gray.state_dict()["stem.conv.weight"], first.sum(1, keepdim=True))
    assert gray.head.fc.weight.shape == (7, 32)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(maps(image)[-1], source.forward_intermediates(image)[1][-1])


def test_a_damaged_file_never_reaches_the_cache(tmp_path: Path, source: torch.nn.Module) -> None:
    content = stored(source, tmp_path / "w.safetensors")
    with serve(Site({"/w-00000000.safetensors": content})) as url, pytest.raises(RuntimeError, match="SHA-256"):
        create(f"{url}/w-00000000.safetensors", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("w*"))


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_mirror_comes_first_and_its_digests_count(
    tmp_path: Path, source: torch.nn.Module, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, file = stored(source, tmp_path / "w.safetensors"), f"{NAME}.t.safetensors"
    right, wrong = (f"{digest}  {file}\n".encode() for digest in (hashlib.sha256(content).hexdigest(), "0" * 64))
    site = Site({f"/m/{file}": content, f"/m/{file}.sha256": wrong})
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / file).write_bytes(content)
    (folder / f"{file}.sha256").write_bytes(wrong)
    image = torch.rand(1, 3, 64, 64)
    with serve(site) as url:
        monkeypatch.setenv("VITRAIL_WEIGHTS_URL", str(folder) if kind == "folder" else f"{url}/m/")
        with pytest.raises(WeightsError, match="expected 0000"):
            create("http://127.0.0.1:9/never.pth", cache_dir=tmp_path / "one")
        (folder / f"{file}.sha256").write_bytes(right)
        site.files[f"/m/{file}.sha256"] = right
        model = create("http://127.0.0.1:9/never.pth", cache_dir=tmp_path / "two")
    torch.testing.assert_close(model(image), source(image))


def test_a_mirror_may_lack_a_file(tmp_path: Path, source: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Site({"/w.safetensors": stored(source, tmp_path / "w.safetensors")})) as url:
        monkeypatch.setenv("VITRAIL_WEIGHTS_URL", f"{url}/mirror")
        create(f"{url}/w.safetensors")
        with pytest.raises(WeightsError, match=r"HTTP 404.*mirror\) does not hold davit_t\.t\.safetensors or x\.pth"):
            create(f"{url}/x.pth")
    monkeypatch.setenv("VITRAIL_WEIGHTS_URL", str(tmp_path / "missing"))
    with pytest.raises(WeightsError, match="an existing folder, or"):
        create("http://127.0.0.1:9/w.safetensors")


def test_a_digest_that_cannot_be_asked_for_is_not_left_out(
    tmp_path: Path, source: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"{NAME}.t.safetensors"
    site = Site({f"/{file}": stored(source, tmp_path / "w.safetensors")}, failing={f"/{file}.sha256": 503})
    with serve(site) as url:
        monkeypatch.setenv("VITRAIL_WEIGHTS_URL", url)
        with pytest.raises(WeightsError, match=r"nothing came from .*sha256: HTTP 503"):
            create(f"{url}/w.safetensors", cache_dir=tmp_path / "cache")
        site.failing[f"/{file}.sha256"] = 403  # how some stores say that there is none
        create(f"{url}/w.safetensors", cache_dir=tmp_path / "cache")


def test_the_hub_file_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    blob = tmp_path / hashlib.sha256(b"whole").hexdigest()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **kwargs: str(blob))
    cfg = PretrainedCfg(hf_hub_id="timm/davit_tiny.msft_in1k")
    blob.write_bytes(b"whole")
    assert locate(NAME, cfg, tmp_path) == blob
    blob.write_bytes(b"half")
    with pytest.raises(WeightsError, match="came damaged"):
        locate(NAME, cfg, tmp_path)
    assert not blob.exists()


def test_the_hub_is_not_asked_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"timm/davit_tiny.* not in .* cache, and the network is switched off"):
        locate(NAME, PretrainedCfg(hf_hub_id="timm/davit_tiny.msft_in1k"), tmp_path)


def test_models_without_a_download_tell_the_manual_path() -> None:
    for name, said in {"biformer_s": "OneDrive", "rmt_t": "Baidu", "vsa_swin_t": "not published"}.items():
        with pytest.raises(WeightsError, match=rf"^No pretrained weights exist for {name} .*{said}"):
            locate(name, timm.get_pretrained_cfg(name))


def test_every_entry_point_has_a_complete_configuration() -> None:
    for name in vitrail.list_models():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None, name
        if cfg.input_size is None:  # a model of point clouds
            continue
        assert len(cfg.mean) == len(cfg.std) == cfg.input_size[0], name
        if cfg.has_weights:
            assert cfg.license, name
            assert cfg.tag, name
            assert cfg.origin_url or is_shipped(cfg), name
            assert cfg.paper_ids, name
            assert cfg.hf_hub_id or _weights._file_name(cfg.url), name


@pytest.mark.parametrize("wrapper", [*_weights.WRAPPERS, None])
def test_wrappers_are_opened_by_choice(wrapper: str | None) -> None:
    sets = {name: {"module.weight": torch.full((2,), float(i))} for i, name in enumerate(_weights.WRAPPERS)}
    if wrapper is None:
        with pytest.raises(WeightsError, match="several sets of weights; choose one"):
            select_weights(sets)
        assert select_weights(sets["model"]).keys() == {"weight"}
        assert select_weights({"model_ema": sets["model_ema"], "epoch": 1})["weight"].tolist() == [1.0, 1.0]
        return
    assert select_weights(sets, wrapper)["weight"].tolist() == [float(_weights.WRAPPERS.index(wrapper))] * 2
    with pytest.raises(WeightsError, match=f"wrapper is '{wrapper}'; the checkpoint has none"):
        select_weights(sets["model"], wrapper)


def test_what_is_missing_or_left_over_is_named() -> None:
    weights = timm.create_model("biformer_n").state_dict()
    model, converted = convert("biformer_n", {"state_dict": weights})
    assert all(torch.equal(converted[key], value) for key, value in weights.items())
    assert not model.training
    for change in ({"extra.weight": torch.ones(1)}, {"stem.0.weight": torch.ones(1)}):
        with pytest.raises(WeightsError, match=rf"does not fit biformer_n: .*{next(iter(change))}"):
            convert("biformer_n", {**weights, **change})
    with pytest.raises(WeightsError, match="does not fit"):
        convert("biformer_n", {key: value for key, value in weights.items() if "head" not in key})


def test_a_checkpoint_with_its_command_line_is_read(tmp_path: Path, source: torch.nn.Module) -> None:
    stored(source, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth")["epoch"] == 3
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list, expected a dict"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pth")


def test_a_stream_of_noise_is_refused_whatever_it_spells(tmp_path: Path) -> None:
    file = tmp_path / "noise.pth"
    noise = random.Random(0)
    for _ in range(300):
        file.write_bytes(b"\x80\x02" + noise.randbytes(200))  # begins as the oldest format does
        with pytest.raises(WeightsError, match=r"damaged|holds"):
            read_checkpoint(file)


SHIPPED = [f"{name}.{cfg.tag}" for name in vitrail.list_models() for cfg in configurations(name) if is_shipped(cfg)]


def test_every_shipped_file_belongs_to_a_configuration_and_is_small() -> None:
    files = sorted(_weights.SHIPPED.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(f"{name}.safetensors" for name in SHIPPED)
    assert max(file.stat().st_size for file in files) < 6e6
    assert sum(file.stat().st_size for file in files) < 35e6


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_what_its_digest_says_and_gives_the_accuracy_of_the_card(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    from vitrail.models.mm.runner import build_dataset
    from vitrail.tools._common.cards import read_facts

    monkeypatch.setenv("VITRAIL_OFFLINE", "1")
    entry, _, tag = name.partition(".")
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert cfg["url"] == f"package:{name}.safetensors"
    assert "file" not in cfg
    assert len(cfg["label_names"]) == cfg["num_classes"] == model.num_classes == 10
    path = _weights.SHIPPED / f"{name}.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    stored = safetensors.torch.load_file(path)
    assert {value.dtype for value in stored.values()} <= {torch.float16, torch.int64}
    (told,) = (own for own in read_facts()[entry]["measured_here"] if own["weights"] == name)
    if tag != "digits":
        return
    settings = timm.data.resolve_data_config({}, model=model)
    transform = {key: settings[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    data = build_dataset({"source": {"type": "digits", "split": "val"}, "transform": transform})
    assert list(data.source.classes) == list(cfg["label_names"])
    with torch.inference_mode():
        found = model(torch.stack([sample["images"] for sample in data])).argmax(1)
    right = (found == torch.tensor(data.source.labels)).sum().item()
    assert round(100 * right / len(data), 2) == told["top1"]


def test_a_shipped_model_of_cifar10_recognises_its_test_images(data_dir: Path) -> None:
    """A few hundred of them: the accuracy is that of the card within three standard deviations."""
    from vitrail.tools._common.cards import read_facts

    count = 400
    archive = np.load(data_dir / "cifar10" / "test.npz")
    data, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"][:count]
    for name in (name for name in SHIPPED if name.endswith(".cifar10")):
        model = timm.create_model(name, pretrained=True).eval()
        assert tuple(archive["classes"]) == model.pretrained_cfg["label_names"]
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        images = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])) for i in range(count)]
        with torch.inference_mode():
            found = model(torch.stack([transform(image) for image in images])).argmax(1).numpy()
        (told,) = (own for own in read_facts()[name.partition(".")[0]]["measured_here"] if own["weights"] == name)
        share = told["top1"] / 100
        assert abs((found == labels).mean() - share) < 3 * (share * (1 - share) / count) ** 0.5


def test_a_damaged_or_missing_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = SHIPPED[0]
    content = (_weights.SHIPPED / f"{name}.safetensors").read_bytes()
    digest = (_weights.SHIPPED / f"{name}.safetensors.sha256").read_text()
    monkeypatch.setattr(_weights, "SHIPPED", tmp_path)
    with pytest.raises(WeightsError, match="not complete"):
        timm.create_model(name, pretrained=True)
    (tmp_path / f"{name}.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="not complete"):
        timm.create_model(name, pretrained=True)
    (tmp_path / f"{name}.safetensors.sha256").write_text(digest)
    with pytest.raises(WeightsError, match="SHA-256"):
        timm.create_model(name, pretrained=True)


def test_shipped_weights_adapt_like_any_other() -> None:
    model = timm.create_model("biformer_n.digits", pretrained=True, num_classes=3, in_chans=1)
    whole = timm.create_model("biformer_n.digits", pretrained=True)
    assert model.head.fc.weight.shape[0] == 3
    assert torch.equal(model.stages[2].blocks[0].attn.qkv.weight, whole.stages[2].blocks[0].attn.qkv.weight)
    assert vitrail.create_model("biformer_n").num_classes == 10
