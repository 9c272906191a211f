"""The one place that counts everything that is left out, with its reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

logger = logging.getLogger("motionenhancer")


class Skip(NamedTuple):
    """One skipped thing: its id, its 1-based line in the data file (0: none) and the reason."""

    id: str
    line: int
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return self.said(self.reason)

    def said(self, reason: str = "") -> str:
        """Place and reason, such as ``"line 3, id a: reason: detail"``, without unknown parts."""
        place = [f"line {self.line}"] * bool(self.line) + [f"id {self.id}"] * bool(self.id)
        return ": ".join(part for part in (", ".join(place), reason, self.detail) if part)


@dataclass
class SkipLog:
    """Counts skipped things by reason, keeps the first ones, and warns about the first of each reason.

    Args:
        keep: number of entries to keep in full. All entries are counted, but memory stays bounded.
        shout: number of entries of each reason that the ``motionenhancer`` logger gets.

    >>> log = SkipLog()
    >>> log.add("empty text", id="a", line=3)
    >>> log.add("empty text", id="b", line=7)
    >>> log.summary()
    '2 skipped: 2 empty text (line 3, id a; line 7, id b)'
    """

    keep: int = 10_000
    shout: int = 3
    counts: Counter[str] = field(default_factory=Counter)
    entries: list[Skip] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Number of skipped things."""
        return sum(self.counts.values())

    def add(self, reason: str, *, id: str = "", line: int = 0, detail: str = "") -> None:
        """Count one skipped thing under ``reason``, a fixed phrase; ``detail`` holds the variable part."""
        skip = Skip(str(id), line, reason, detail)
        self.counts[reason] += 1
        if len(self.entries) < self.keep:
            self.entries.append(skip)
        if self.counts[reason] <= self.shout:
            last = self.counts[reason] == self.shout
            logger.warning("skipped %s%s", skip, " (more of these are counted, not printed)" if last else "")

    def note(self, what: str, *, id: str = "") -> None:
        """Count something odd that was not skipped. Its first occurrence is a warning, with the sample's id.

        After ``keep`` different notes, new notes are counted together.
        """
        if what not in self.notes and len(self.notes) >= self.keep:
            what = "further notes of other kinds"
        self.notes[what] += 1
        if self.notes[what] == 1:
            logger.warning("%s (more of these are counted, not printed)", f"{id}: {what}" if id else what)

    def merge(self, others: Iterable[SkipLog]) -> None:
        """Add the counts and entries of other logs, such as those of worker processes, without printing."""
        for other in others:
            self.counts.update(other.counts)
            self.notes.update(other.notes)
            self.entries.extend(other.entries[: max(0, self.keep - len(self.entries))])

    def summary(self, examples: int = 2) -> str:
        """Say in one line how many were skipped and why, with the first ``examples`` of each reason."""
        if not self.total:
            return "nothing skipped"
        parts = []
        for reason, count in self.counts.most_common():
            first = [entry.said() for entry in self.entries if entry.reason == reason][:examples]
            listed = "; ".join(filter(None, first))
            parts.append(f"{count} {reason}" + (f" ({listed})" if listed else ""))
        said = f"{self.total} skipped: " + ", ".join(parts)
        # File names may hold bytes that are not text and cannot be printed.
        return said.encode("utf-8", "backslashreplace").decode()

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain types: total, counts by reason, notes, and the kept entries."""
        return {
            "total": self.total,
            "counts": dict(self.counts.most_common()),
            "notes": dict(self.notes.most_common()),
            "entries": [entry._asdict() for entry in self.entries],
            "entries_left_out": self.total - len(self.entries),
        }
