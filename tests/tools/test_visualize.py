"""Pictures of what models look at: the figures behind them, the files, and the page in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.layers.gated_retention import SwatRetention, balanced_slopes
from vitrail.layers.retention import manhattan_decay
from vitrail.layers.routing import FullAttention
from vitrail.layers.varied_window import VariedWindowAttention
from vitrail.layers.window import WindowAttention
from vitrail.tools._common import draw
from vitrail.tools.visualize import main

_QUERY = (0.3, 0.6)
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _model(name: str) -> nn.Module:
    return timm.create_model(name).eval()


def _image(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size)


def _covered(panel: draw.Panel, height: int, width: int) -> Tensor:
    """Which tokens the filled boxes of a panel cover."""
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    covered = torch.zeros(height, width, dtype=torch.bool)
    for box in panel.boxes:
        if box.filled:
            covered |= ((y > box.top) & (y < box.bottom))[:, None] & ((x > box.left) & (x < box.right))
    return covered


class _Page(HTMLParser):
    """What a page holds, its structure checked on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = defaultdict(list)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            given = dict(attrs)
            self.pictures.append((given["src"] or "", given["alt"] or ""))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts[self.open[-1]].append(data)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    colors = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((96, 72), Image.Resampling.BICUBIC).save(tmp_path / "a <photo>.png")
    return tmp_path / "a <photo>.png"


def test_weights_are_those_of_the_softmax() -> None:
    layer, x = FullAttention(32, 2), torch.randn(1, 5, 7, 32)
    nn.init.normal_(layer.qkv.weight)
    q, k, _ = layer.qkv(x).view(35, 3, 2, 16).permute(1, 2, 0, 3)
    expected = (q @ k.transpose(1, 2) * 16**-0.5).softmax(-1)[:, 3 * 7 + 2].view(2, 5, 7)
    assert torch.allclose(draw.attention_weights(layer, (x,), _QUERY), expected, atol=1e-6)


def test_weights_stay_inside_the_window() -> None:
    layer, x = WindowAttention(32, 2, window_size=4), torch.randn(1, 8, 8, 32)
    weights = draw.attention_weights(layer, (x,), _QUERY)  # row 4, column 2
    assert torch.allclose(weights.sum((1, 2)), torch.ones(2))
    assert (weights[:, 4:, :4] > 0).all()
    assert weights[:, :4].abs().max() == weights[:, :, 4:].abs().max() == 0


@pytest.mark.parametrize("gate_target", ["value", "output"])
def test_weights_of_gated_retention_are_those_that_it_takes_values_with(gate_target: str) -> None:
    layer, x = SwatRetention(32, 2, window_size=4, gate_target=gate_target), torch.randn(1, 9, 6, 32)
    weights = draw.attention_weights(layer, (x, x), _QUERY)  # row 5, column 1
    q, k, v = layer._project(x)
    decay, slopes = manhattan_decay(2, 2.0, 4.0, q), balanced_slopes(2, False, q)
    result = layer._attend(q, k, v, decay, slopes)
    assert torch.allclose(torch.einsum("hyx,yxhd->hd", weights, v[0]), result[0, 5, 1], atol=1e-5)
    assert (weights[:, 4:8, :4] > 0).all()
    assert weights[:, :4].abs().max() == weights[:, 8:].abs().max() == weights[:, :, 4:].abs().max() == 0
    assert "_attend" not in vars(layer)


def test_a_query_attends_to_its_routed_regions() -> None:
    model, image = _model("biformer_n"), _image()
    panels = draw.routed_regions(model, image, _QUERY)
    weights = draw.query_attention(model, image, _QUERY)
    assert len(panels) == 3
    for panel, attention in zip(panels, weights, strict=False):
        assert attention.heat is not None
        assert torch.equal(_covered(panel, *attention.heat.shape), attention.heat > 0)


def test_windows_follow_their_prediction() -> None:
    model = _model("vsa_swin_n")
    layers = [layer for layer in model.modules() if isinstance(layer, VariedWindowAttention)]
    (panel, *_) = draw.learned_windows(model, _image(), _QUERY)
    window, *heads = panel.boxes
    assert all(head[:4] == pytest.approx(window[:4]) for head in heads)
    for layer in layers:  # one token down for every head, twice as wide
        layer.transform.bias.data.view(-1, 4)[:, 2] = 1.0
    (panel, *_) = draw.learned_windows(model, _image(), _QUERY)
    window, *heads = panel.boxes
    for head in heads:
        assert head.right - head.left == pytest.approx(2 * (window.right - window.left))
        assert head.bottom - head.top == pytest.approx(window.bottom - window.top)


@pytest.mark.skipif(not timm.is_model("dinat_n"), reason="this version has no neighborhood attention")
def test_a_query_attends_to_its_neighborhood() -> None:
    from vitrail.layers.neighborhood import NeighborhoodAttention

    model, image = _model("dinat_n"), _image(128)
    for panel in draw.neighborhoods(model, image, _QUERY):
        stage, block = (int(number) - 1 for number in re.findall(r"\d+", panel.title)[:2])
        name = f"stages.{stage}.blocks.{block}.attn"
        layer = model.get_submodule(name)
        assert isinstance(layer, NeighborhoodAttention)
        inputs = draw.layer_inputs(model, image, {name: layer})[name]
        weights = draw.attention_weights(layer, inputs, _QUERY).mean(0)
        assert torch.equal(_covered(panel, *weights.shape), weights > 0)


def test_decay_fields_fall_with_the_distance() -> None:
    panels = draw.decay_fields(_model("rmt_n"), _image(), _QUERY)
    heat = panels[0].heat
    assert heat is not None
    row, column = int(_QUERY[1] * heat.shape[0]), int(_QUERY[0] * heat.shape[1])
    factor = manhattan_decay(1, 2.0, 0.0, heat)[0].exp()
    assert heat[row, column] == 1
    assert heat[row + 1, column + 2] == pytest.approx((factor**3).item())


def test_strips_are_products_of_gates() -> None:
    panels = draw.strip_gates(_model("resnet18_ela_t"), _image(), _QUERY)
    assert len(panels) == 4
    for panel in panels:
        assert panel.heat is not None
        assert 0 < panel.heat.min() <= panel.heat.max() < 1


def test_receptive_fields_grow_and_respect_their_bound() -> None:
    stem, *stages = draw.receptive_fields(_model("resnet18_ela_t"), _image(96), _QUERY)
    assert stem.heat is not None
    seen = (stem.heat > 0).nonzero()
    assert ((seen.amax(0) - seen.amin(0)) < 7).all()  # the stem is one convolution of 7 x 7
    assert all(stage.heat is not None and (stage.heat > 0).sum() > len(seen) for stage in stages)


def test_class_activation_is_a_map_of_the_last_stage() -> None:
    model = _model("resnet18_ela_t")
    (panel,) = draw.class_activation(model, _image(96), _QUERY)
    assert panel.heat is not None
    assert panel.heat.shape == (3, 3)
    assert panel.heat.min() >= 0
    assert re.fullmatch(r"class \d+, \d+ %", panel.title)
    model.pretrained_cfg["label_names"] = tuple(f"thing {i}" for i in range(1000))
    (panel,) = draw.class_activation(model, _image(96), _QUERY)
    assert re.fullmatch(r"thing \d+, \d+ %", panel.title)


@pytest.mark.parametrize(
    "name", ["davit_t", "gated_swinrmt_swat_n", "l2vit_n", "mobilenetv2_ela_b", "swin_t", "vsa_vitae_s"]
)
def test_other_families_are_drawn(name: str) -> None:
    small = {"depths": (1, 1, 1, 1)} if name in ("davit_t", "swin_t", "vsa_vitae_s") else {}
    panels = draw.all_panels(timm.create_model(name, **small).eval(), _image(), _QUERY)
    assert {"class activation", "effective receptive fields"} <= panels.keys()
    assert ("attention of the query" in panels) == (name != "mobilenetv2_ela_b")
    heats = [panel.heat for of_kind in panels.values() for panel in of_kind if panel.heat is not None]
    assert all(heat.isfinite().all() for heat in heats)


def test_files(photo: Path, tmp_path: Path) -> None:
    arguments = [
        "biformer_n",
        str(photo),
        "--compare",
        "rmt_n",
        "--img-size",
        "32",
        "48",
        "-o",
        str(tmp_path / "out.v1"),
    ]
    assert main(arguments) == 0
    with Image.open(tmp_path / "out.v1.png") as picture:
        assert min(picture.size) > 400
    page = (tmp_path / "out.v1.html").read_text()
    read = _Page()
    read.feed(page)
    read.close()
    assert read.open == []
    assert len(read.pictures) > 10
    for source, meaning in read.pictures:
        assert meaning
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert picture.width > picture.height  # the image is 32 x 48
    models = [read.texts["h3"].count(f"{name}, random weights") for name in ("biformer_n", "rmt_n")]
    assert models == [len(read.texts["h2"])] * 2
    assert {"Class activation", "Routed regions", "Decay fields"} <= set(read.texts["h2"])
    assert len(read.texts["p"]) > len(read.texts["h2"])  # each kind is explained, and what a model lacks is said
    assert not re.search(r"https?:|@import|<script|<link|url\(", page)
    assert "a &lt;photo&gt;.png" in page
    assert "<photo>" not in page


def test_a_checkpoint_is_used(photo: Path, tmp_path: Path) -> None:
    trained = timm.create_model("l2vit_n", num_classes=3)
    with torch.no_grad():
        trained.head.fc.bias[1] = 50.0
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    assert main([f"l2vit_n={tmp_path / 'weights.pth'}", str(photo), "-o", str(tmp_path / "out")]) == 0
    assert "class 1, 100 %" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "hint"),
    [
        (["biformer_x", "PHOTO"], 2, "unknown model"),
        (["biformer_n.other", "PHOTO"], 2, "'other'"),
        (["biformer_n", "PHOTO", "--compare", "scatterformer_kitti_n"], 2, "takes points"),
        (["biformer_n", "PHOTO", "--query", "2", "0"], 2, "--query"),
        (["biformer_n", "PHOTO", "--img-size", "0"], 2, "--img-size"),
        (["biformer_n", "PHOTO", "-o", "no/such/folder/out"], 2, "does not exist"),
        (["biformer_n", "no_photo.png"], 1, "no_photo.png"),
        (["biformer_n", "TEXT"], 1, "no image"),
        (["biformer_n"], 2, "IMAGE"),
    ],
)
def test_bad_usage(
    arguments: list[str], status: int, hint: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    places = {"PHOTO": str(photo), "TEXT": str(tmp_path / "text.png")}
    assert main([places.get(a, a) for a in arguments]) == status
    assert hint in capsys.readouterr().err


@pytest.mark.skipif(_CHROMIUM is None, reason="needs a Chromium browser")
def test_the_page_in_a_browser(photo: Path, tmp_path: Path) -> None:
    assert main(["biformer_n", str(photo), "-o", str(tmp_path / "out")]) == 0
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=900,1200", f"--screenshot={shot}", (tmp_path / "out.html").as_uri()]
    subprocess.run([str(_CHROMIUM), *flags, *size], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture:
        colors = picture.convert("RGB").getcolors(1_000_000)
    assert colors is not None
    assert len(colors) > 1000  # of the pictures; text and background alone have a few shades
