"""Where the pretrained weights of every model lie, how what arrives is checked, and whether the servers answer."""

from __future__ import annotations

import functools
import os
from fnmatch import fnmatch
from pathlib import Path

from timm.models import PretrainedCfg

import vitrail
from vitrail.models._fetch import NotServedError, WeightsError, digest_in_name, probe
from vitrail.models._registry import configurations, is_shipped
from vitrail.models._weights import HUB_FILE
from vitrail.tools._common.table import Row

_HUB = "hf-hub:"


def sources(pattern: str = "*") -> list[Row]:
    """One row for every pretrained configuration: name, access, place, how it is checked, licence, what to know.

    Args:
        pattern: Shell-style pattern of names, or of names with their tags.
    """
    rows = [_source(name, cfg) for name in vitrail.list_models() for cfg in configurations(name)]
    return [row for row in rows if fnmatch(row["name"], pattern) or fnmatch(row["name"].partition(".")[0], pattern)]


def _source(name: str, cfg: PretrainedCfg) -> Row:
    place = f"{_HUB}{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url or None
    unpublished = not place and not any("browser" in note or "by hand" in note for note in cfg.notes or ())
    access = "included" if is_shipped(cfg) else "download" if place else "none" if unpublished else "by hand"
    return {
        "name": f"{name}.{cfg.tag}" if cfg.tag else name,
        "access": access,
        "place": place or (None if unpublished else cfg.origin_url),
        "checked": _how_checked(cfg) if place else None,
        "license": cfg.license,
        "notes": " ".join(cfg.notes or ()) or cfg.description,
    }


def _how_checked(cfg: PretrainedCfg) -> str:
    """What makes sure that the content that arrives is the right one."""
    if is_shipped(cfg):
        return "SHA-256"
    if cfg.hf_hub_id:
        return "the Hub's SHA-256"
    return "SHA-256 in its name" if digest_in_name(Path(cfg.url).name) else "length, structure"


def ask_server(source: Row) -> str | None:
    """What the server of a source says of its file: there, wants a login, dead, no answer; None without a server."""
    return _answer(source["place"]) if source["access"] == "download" else None


@functools.cache
def _answer(place: str) -> str:
    if place.startswith(_HUB):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        place = f"{hub}/{place.removeprefix(_HUB)}/resolve/main/{HUB_FILE}"
    try:
        size = probe(place)
    except NotServedError as error:
        return "wants a login" if error.code in (200, 401, 403) else f"dead: HTTP {error.code}"
    except WeightsError as error:
        return f"no answer: {str(error).rpartition(': ')[2]}"
    return "there" if size is None else f"there, {size / 1e6:.1f} MB"
