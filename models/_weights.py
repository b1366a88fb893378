"""Where pretrained weights lie, and how they come from there into a model.

Some small models come with the package: their configuration's address is `package:FILE`, a file of the folder
`weights` beside the code. Everything else is fetched.

| environment variable | meaning |
|---|---|
| `VITRAIL_WEIGHTS_URL` | folder or http(s) address asked first; holds `NAME.TAG.safetensors` or official files |
| `VITRAIL_OFFLINE=1`, `HF_HUB_OFFLINE=1` | no network: only that folder and what was downloaded before |
| `HF_ENDPOINT` | a mirror of the Hugging Face Hub |

A file `FILE.sha256` beside a file of the folder or address (in the form of `sha256sum`) makes its content certain.
"""

from __future__ import annotations

import argparse
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from timm.models import build_model_with_cfg as build_with_timm
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from vitrail.models._checkpoint import DamagedError, HoldsObjectsError, describe_misfits, load_without_code
from vitrail.models._fetch import NotServedError, Progress, WeightsError, fetch, file_digest, verify
from vitrail.models._registry import PACKAGE, configurations, is_shipped

__all__ = ["WRAPPERS", "WeightsError", "build_model_with_cfg", "locate", "read_checkpoint", "select_weights"]

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
SHIPPED = Path(__file__).parent.parent / "weights"  # what came with the package
HUB_FILE = "model.safetensors"


def build_model_with_cfg(
    model_cls: Any,
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's function of this name, whose weights come through `locate`; its arguments and its result are timm's.

    Raises:
        WeightsError: There are no weights, or they cannot be had.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    found = None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        if not (cfg.file or cfg.state_dict or cfg.source):  # the caller's own weights are timm's business
            found = overlay["file"] = str(locate(variant, cfg, cache_dir))
    model = build_with_timm(model_cls, variant, pretrained, pretrained_cfg, overlay, **kwargs)
    if found:
        model.pretrained_cfg.pop("file", None)  # the model tells the public source, not a path of this computer
    return model


def locate(
    variant: str,
    cfg: PretrainedCfg,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The verified file with a variant's weights, downloaded if it has to be.

    Args:
        variant: Name of an entry point, without tag.
        cfg: One of its pretrained configurations.
        cache_dir: Where downloads are kept; default: torch's cache of checkpoints.
        progress: Called with (bytes so far, bytes in all or None).

    Raises:
        WeightsError: There are no weights, or they cannot be had.
        OSError: No room or no permission in the cache.
    """
    name = f"{variant}.{cfg.tag}" if cfg.tag else variant
    url = cfg.url if isinstance(cfg.url, str) else (cfg.url or ("",))[0]
    if is_shipped(cfg):
        return _shipped(url.removeprefix(PACKAGE))
    cache = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    if mirrored := _from_mirror(name, url, cache, progress):
        return mirrored
    try:
        if cfg.hf_hub_id:
            return _from_hub(cfg.hf_hub_id, cfg.hf_hub_filename or HUB_FILE, cache_dir)
        if url:
            return _download(url, cache, progress)
        raise WeightsError(_describe_absence(variant, name, cfg))
    except WeightsError as error:
        if place := os.environ.get("VITRAIL_WEIGHTS_URL"):
            looked_for = " or ".join(_mirrored_names(name, url))
            said = str(error).rstrip(".")
            raise WeightsError(f"{said}; VITRAIL_WEIGHTS_URL ({place}) does not hold {looked_for} either") from error
        raise


def _describe_absence(variant: str, name: str, cfg: PretrainedCfg) -> str:
    """Why a configuration has no weights, and which others of the variant have some."""
    others = [f"{variant}.{one.tag}" for one in configurations(variant) if one.has_weights and one.tag != cfg.tag]
    notes = f": {' '.join(cfg.notes)}" if cfg.notes else ""
    hint = f"; there are some for {', '.join(others)}" if others else ""
    return f"No pretrained weights exist for {name} that a program can fetch{notes}{hint}"


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


_OFFLINE = ("VITRAIL_OFFLINE", "HF_HUB_OFFLINE")
_SWITCHED_OFF = f"the network is switched off ({' or '.join(_OFFLINE)})"


def _file_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def _mirrored_names(name: str, url: str) -> list[str]:
    """The files, by name, that count as a variant's in the user's own folder or address."""
    return [f"{name}.safetensors", *filter(None, [_file_name(url)])]


def _from_mirror(name: str, url: str, cache: Path, progress: Progress | None) -> Path | None:
    """The file of the user's own folder or address, or None where there is neither or it lacks the file."""
    place = os.environ.get("VITRAIL_WEIGHTS_URL", "")
    if not place:
        return None
    candidates = _mirrored_names(name, url)
    if place.startswith(("http://", "https://")):
        return next(filter(None, (_from_address(place, file, cache, progress) for file in candidates)), None)
    folder = Path(place.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"VITRAIL_WEIGHTS_URL is {place!r}; allowed: an existing folder, or an http(s) address")
    found = next((folder / file for file in candidates if (folder / file).is_file()), None)
    if found:
        verify(found, _digest_beside(found))
    return found


def _shipped(file: str) -> Path:
    """A file that came with the package, verified."""
    path = SHIPPED / file
    digest = _digest_beside(path)
    if digest is None or not path.is_file():
        raise WeightsError(f"{path} or its .sha256 is missing: this installation of vitrail is not complete")
    verify(path, digest)
    return path


def _digest_beside(path: Path) -> str | None:
    """The digest in the file `FILE.sha256`, or None where there is no such file."""
    beside = path.with_name(f"{path.name}.sha256")
    return _first_word(beside.read_text(), beside) if beside.is_file() else None


def _from_address(place: str, file: str, cache: Path, progress: Progress | None) -> Path | None:
    """A file of the user's address; kept apart from official files, which may have the same name."""
    folder = cache / "vitrail-mirror"
    if is_offline():
        return folder / file if (folder / file).is_file() else None
    address = f"{place.rstrip('/')}/{urllib.parse.quote(file)}"
    try:
        listed = fetch(f"{address}.sha256", folder, check=_is_digest_line)
    except NotServedError:
        listed = None
    try:
        return fetch(address, folder, sha256=_first_word(listed.read_text(), address) if listed else None,
                     progress=progress)  # fmt: skip
    except NotServedError as error:
        if error.code == 404:
            return None
        raise


def _is_digest_line(path: Path, suffix: str) -> str | None:
    return None if len(path.read_bytes()[:4096].split(maxsplit=1)[:1]) == 1 else "is empty"


def _first_word(text: str, source: object) -> str:
    word = (text.split() or [""])[0]
    if len(word) != 64:
        raise WeightsError(f"{source} holds no SHA-256 in the form of sha256sum")
    return word


def _download(url: str, cache: Path, progress: Progress | None) -> Path:
    if is_offline():
        path = cache / _file_name(url)
        if path.is_file():
            return path
        raise WeightsError(f"{url} is not in {cache}, and {_SWITCHED_OFF}")
    return fetch(url, cache, progress=progress)


def _from_hub(repo: str, filename: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """A file of the Hugging Face Hub, whose own client resumes, locks and caches."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = repo.partition("@")
    where = {"repo_id": repo, "filename": filename, "revision": revision or None, "cache_dir": cache_dir}
    known = isinstance(try_to_load_from_cache(**where), str)
    if is_offline() and not known:
        raise WeightsError(f"{filename} of {repo} is not in the Hugging Face Hub's cache, and {_SWITCHED_OFF}")
    try:
        path = Path(hf_hub_download(**where, endpoint=os.environ.get("HF_ENDPOINT"), local_files_only=is_offline()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{filename} of {repo} on the Hugging Face Hub cannot be had: {first}") from error
    if not known:
        _verify_blob(path)
    return path


def _verify_blob(path: Path) -> None:
    """Checks a file that the Hub's client has just stored; the Hub names large files by their SHA-256."""
    blob = path.resolve()
    if len(blob.name) == 64 and file_digest(blob) != blob.name:
        blob.unlink()
        raise WeightsError(f"{path.name} came damaged from the Hugging Face Hub and was removed: {blob.name} expected")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.safetensors` or `torch.save` file without running any code from it.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It is damaged, or holds objects other than tensors and plain containers.
    """
    path = Path(path)
    verify(path)
    try:
        # Official files keep their command line beside the weights, as such an object without behaviour.
        content = load_without_code(path, harmless=[argparse.Namespace])
    except HoldsObjectsError as error:
        raise WeightsError(f"{path} holds Python objects that could run code; it is refused") from error
    except DamagedError as error:
        reason = f": {error}" if str(error) else ""
        raise WeightsError(f"{path} is damaged{reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def select_weights(checkpoint: Mapping[str, Any], wrapper: str | None = None) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the counters and settings around it and without "module." prefixes.

    Args:
        checkpoint: What a file holds.
        wrapper: Which of `WRAPPERS` to open; None is right for a file with only one, or with none.

    Raises:
        WeightsError: The wrapper is not there, several are and none was chosen, or there are no weights.
    """
    present = [name for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
    if wrapper is not None and wrapper not in present:
        raise WeightsError(f"wrapper is {wrapper!r}; the checkpoint has {', '.join(present) or 'none'}")
    if wrapper is None and len(present) > 1:
        raise WeightsError(f"the checkpoint holds several sets of weights; choose one as wrapper: {', '.join(present)}")
    content = checkpoint[wrapper or present[0]] if present else checkpoint
    weights = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise WeightsError("the checkpoint holds no weights")
    return weights


def convert(
    variant: str, checkpoint: Mapping[str, Any], wrapper: str | None = None, **kwargs: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Turns an official checkpoint into a model with its weights, which all fit.

    Args:
        variant: Name of the entry point; the number of classes is that of the checkpoint.
        checkpoint: What the official file holds.
        wrapper: See `select_weights`.
        **kwargs: Further arguments of the model.

    Returns:
        The model in evaluation mode, and its state dict in the checkpoint's precision.

    Raises:
        WeightsError: A parameter is missing, left over or has another shape.
    """
    entry = timm.models.model_entrypoint(variant)
    rename = __import__(entry.__module__, fromlist=["checkpoint_filter_fn"]).checkpoint_filter_fn
    weights = select_weights(checkpoint, wrapper)
    model = timm.create_model(variant, **kwargs).eval()
    renamed = rename(weights, model)
    classifier = renamed.get(f"{model.pretrained_cfg['classifier']}.weight")
    if classifier is not None and len(classifier) != model.num_classes:
        model.reset_classifier(len(classifier))
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    model.to(dtype)
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    complete = {**counters, **renamed}
    if problems := describe_misfits(model.state_dict(), complete):
        raise WeightsError(f"the checkpoint does not fit {variant}: {problems}")
    model.load_state_dict(complete)
    return model, {key: value.contiguous().clone() for key, value in model.state_dict().items()}
