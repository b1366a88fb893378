"""What mkdocs calls for every page.

Formulas of docstrings become MathML, which browsers draw without scripts; figures that lie in files become tables.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

from vitrail.tools._common import export_table

_INLINE = re.compile(r":math:<code>(.*?)</code>", re.S)
_BLOCK = re.compile(r"<p>\.\. math::(.*?)</p>", re.S)
_EXPORTS = "<!-- exports -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table of exported models in its place."""
    if _EXPORTS not in markdown:
        return markdown
    return markdown.replace(_EXPORTS, export_table.render(export_table.read_rows()))


def on_page_content(content: str, **_: Any) -> str:
    """Replaces the docstrings' math roles and directives in a page's HTML."""
    content = _INLINE.sub(lambda found: convert(_source(found[1])), content)
    return _BLOCK.sub(lambda found: f"<p>{convert(_source(found[1]), display='block')}</p>", content)


def _source(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
