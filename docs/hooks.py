"""What mkdocs calls for every page: formulas of docstrings become MathML, which browsers draw without scripts."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r":math:<code>(.*?)</code>", re.S)
_BLOCK = re.compile(r"<p>\.\. math::(.*?)</p>", re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces the docstrings' math roles and directives in a page's HTML."""
    content = _INLINE.sub(lambda found: convert(_source(found[1])), content)
    return _BLOCK.sub(lambda found: f"<p>{convert(_source(found[1]), display='block')}</p>", content)


def _source(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
