"""What is wrong with data files: collected by kind, named and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 3


class BadDataError(ValueError):
    """The data cannot be trained on; the message has every kind of fault, its count and examples."""


@dataclass
class Findings:
    """Names of what was found, by kind.

    Attributes:
        faults: What training would stumble over, or silently learn wrongly from.
        notes: What the libraries leave out, and what was not checked.
        checked: How many things of a kind were looked at.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    checked: dict[str, int] = field(default_factory=dict)

    def fault(self, kind: str, name: str) -> None:
        """Notes down one fault."""
        self.faults.setdefault(kind, []).append(name)

    def note(self, kind: str, name: str) -> None:
        """Notes down something that does no harm but should be known."""
        self.notes.setdefault(kind, []).append(name)

    def count(self, kind: str, number: int = 1) -> None:
        """Adds to what was looked at."""
        self.checked[kind] = self.checked.get(kind, 0) + number

    def refuse_faults(self) -> None:
        """Raises `BadDataError` if there are faults."""
        if self.faults:
            lines = [one_line(kind, names) for kind, names in self.faults.items()]
            raise BadDataError(f"{'; '.join(lines)} (vitrail-check-data looks at all files and names every one)")

    def to_json(self) -> dict[str, Any]:
        """All names."""
        return {"faults": self.faults, "notes": self.notes, "checked": self.checked}


def one_line(kind: str, names: Sequence[str]) -> str:
    """The number of findings of a kind, with examples."""
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} {kind}: {', '.join(names[:_SHOWN])}{more}"


def evenly(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the items, spread evenly over them; all for None."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
