"""The weights command: table of sources, fetching, conversion with its proof, verification."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from _weights_server import Site, serve

import vitrail
from vitrail.tools._common.golden import CASES
from vitrail.tools._common.weight_sources import ask_server, sources
from vitrail.tools.weights import conversion_error, main


@pytest.fixture(autouse=True)
def _no_golden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITRAIL_SHARED", str(tmp_path / "nothing"))


def test_list_has_every_model_and_says_how_to_get_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in sources()}
    assert {name.partition(".")[0] for name in rows} == set(vitrail.list_models())
    assert rows["davit_t.msft_in1k"] == {
        "name": "davit_t.msft_in1k",
        "access": "download",
        "place": "hf-hub:timm/davit_tiny.msft_in1k",
        "checked": "the Hub's SHA-256",
        "license": "apache-2.0",
        "notes": None,
    }
    assert rows["biformer_b"]["access"] == "by hand"
    assert "OneDrive" in rows["biformer_b"]["notes"]
    assert rows["vsa_swin_t"]["access"] == "none"
    assert rows["biformer_n.digits"]["access"] == rows["mobilenetv2_ela_b.digits"]["access"] == "included"
    assert rows["biformer_n.digits"]["checked"] == "SHA-256"
    assert rows["nat_t.shi_in1k"]["checked"] == "length, structure"
    assert rows["biformer_n.digits"]["notes"] == "trained on scikit-learn's handwritten digits"
    assert main(["list", "rmt_*"]) == 0
    assert "Baidu" in capsys.readouterr().out
    assert main(["list", "--json", "rmt_*"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= {"rmt_t", "rmt_s", "rmt_b", "rmt_l"}
    assert main(["list", "no_such*"]) == 2
    assert [row["name"] for row in sources("davit_t.*")] == ["davit_t.msft_in1k"]


def test_list_asks_the_servers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site = Site({"/there.pth": b"x" * 1_500_000, "/page.pth": b"log in"}, failing={"/closed.pth": 403})
    site.types["/page.pth"] = "text/html"
    with serve(site) as url:
        places = [f"{url}/{name}.pth" for name in ("there", "page", "closed", "gone")]
        answers = [ask_server({"access": "download", "place": place}) for place in places]
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert main(["list", "davit_t", "--try"]) == 0
    assert answers == ["there, 1.5 MB", "wants a login", "wants a login", "dead: HTTP 404"]
    assert site.requests[-1][0] == "/timm/davit_tiny.msft_in1k/resolve/main/model.safetensors"
    assert "dead: HTTP 404" in capsys.readouterr().out
    assert ask_server({"access": "download", "place": f"{url}/closed.now"}) == "no answer: Connection refused"
    assert ask_server({"access": "by hand", "place": url}) is None
    monkeypatch.setenv("VITRAIL_OFFLINE", "1")
    assert main(["list", "davit_t", "--try"]) == 2


def test_names_with_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "davit_t.other"]) == 2
    assert "'other'; its tags: msft_in1k" in capsys.readouterr().err
    assert main(["fetch", "davit_t", "--sha256", "0" * 64]) == 2
    assert main(["fetch", "resnet18_ela_t.untrained"]) == 1
    assert "resnet18_ela_t.start_a1_in1k" in capsys.readouterr().err
    assert main(["fetch", "biformer_n.digits", "--to", str(tmp_path / "here")]) == 0
    whole = tmp_path / "here" / "biformer_n.digits.safetensors"
    assert main(["convert", "biformer_n.digits", str(whole), "--output", str(tmp_path / "again.safetensors")]) == 0
    assert (
        safetensors.torch.load_file(tmp_path / "again.safetensors").keys() == safetensors.torch.load_file(whole).keys()
    )


def test_fetch_from_another_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = safetensors.torch.save({"weight": torch.ones(3)})
    digest = hashlib.sha256(content).hexdigest()
    with serve(Site({"/w.safetensors": content})) as url:
        arguments = ["fetch", "davit_t", "--url", f"{url}/w.safetensors", "--to", str(tmp_path)]
        assert main([*arguments, "--sha256", "0" * 64]) == 1
        assert main([*arguments, "--sha256", digest]) == 0
    captured = capsys.readouterr()
    assert digest in captured.out
    assert "expected 0000" in captured.err
    assert main(["fetch", "davitt"]) == 2
    assert main(["fetch", "vsa_swin_t"]) == 1
    assert "not published" in capsys.readouterr().err


def test_convert_writes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("biformer_n", num_classes=5).eval()
    averaged = {key: value + 1 if key.endswith("fc.bias") else value for key, value in model.state_dict().items()}
    official, output = tmp_path / "official.pth", tmp_path / "out.safetensors"
    torch.save({"model": model.state_dict(), "model_ema": averaged}, official)
    arguments = ["convert", "biformer_n", str(official), "--output", str(output)]
    assert main(arguments) == 1
    assert "choose one" in capsys.readouterr().err
    assert main([*arguments, "--wrapper", "model_ema", "--dtype", "float16"]) == 0
    assert "5 classes" in capsys.readouterr().out
    stored = safetensors.torch.load_file(output)
    assert stored["head.fc.bias"].dtype == torch.float16
    digest = (tmp_path / "out.safetensors.sha256").read_text().split()[0]
    assert main(["verify", str(output), "--sha256", digest, "--model", "biformer_n"]) == 0
    loaded = timm.create_model("biformer_n", num_classes=5, checkpoint_path=str(output))
    torch.testing.assert_close(loaded.head.fc.bias, model.head.fc.bias + 1, rtol=1e-3, atol=1e-3)
    assert main(["verify", str(output), "--model", "rmt_n"]) == 1
    assert "does not fit rmt_n" in capsys.readouterr().err
    output.write_bytes(output.read_bytes()[:-1])
    assert main(["verify", str(output)]) == 1


def test_convert_refuses_what_overflows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = timm.create_model("biformer_n").state_dict()
    weights["head.fc.bias"][0] = 1e6
    torch.save(weights, tmp_path / "w.pth")
    output = tmp_path / "w.safetensors"
    arguments = ["convert", "biformer_n", str(tmp_path / "w.pth"), "--output", str(output)]
    assert main([*arguments, "--dtype", "float16"]) == 1
    assert "overflow" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments[:-1], str(tmp_path / "w.bin")]) == 2


def test_verify_without_golden_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--golden", "--model", "davit_t"]) == 1
    assert "VITRAIL_SHARED" in capsys.readouterr().err
    assert main(["verify"]) == main(["verify", "some.pth", "--golden", "--model", "davit_t"]) == 2


# One for each way in which official files wrap and name their weights; `verify --golden` proves every other.
@pytest.mark.parametrize(
    ("name", "wrapper"), [("davit_t", "model"), ("vsa_vitae_s", "state_dict_ema"), ("l2vit_t", "model_ema")]
)
def test_an_official_layout_converts_to_the_official_logits(golden_dir: Path, name: str, wrapper: str) -> None:
    assert conversion_error(name, golden_dir, lambda weights: {wrapper: weights, "epoch": 1}) < 1e-8


def test_a_wrong_conversion_is_noticed(golden_dir: Path) -> None:
    def swap(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "classifier.1.bias": weights["classifier.1.bias"].roll(1)}

    assert conversion_error("mobilenetv2_ela_l", golden_dir, swap) > 1e-6  # the smallest one


def test_every_golden_case_of_the_table_exists(golden_dir: Path) -> None:
    assert set(CASES) <= set(vitrail.list_models())
    assert all((golden_dir / f"{case}.json").is_file() for case in CASES.values())
