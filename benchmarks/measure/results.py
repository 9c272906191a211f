"""Reading a results file. Needs neither torch nor the packages that were measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "ours"
QUANTILES = ("p20", "p50", "p80")


class ResultsError(ValueError):
    """A file that cannot be reported on; the message names it and says why."""


@dataclass(frozen=True)
class Figure:
    """One role at one size."""

    work: str
    case: str
    role: str
    backend: str | None
    dtype: str
    length: int
    seconds: dict[str, float]
    device_seconds: dict[str, float] | None
    host_seconds: dict[str, float] | None
    """What the host takes to start a call, on a GPU."""
    over_ours: dict[str, float] | None
    peak_bytes: int
    floor_seconds: float | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two figures of different files the same measurement."""
        return self.work, self.case, self.role, self.dtype

    @property
    def best(self) -> dict[str, float]:
        """Time on the device where it was taken, else on the clock."""
        return self.device_seconds or self.seconds


@dataclass(frozen=True)
class Results:
    """A whole file."""

    path: Path
    device: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    figures: list[Figure]
    refused: list[dict[str, str]]
    skipped: list[dict[str, str]]

    def groups(self) -> dict[tuple[str, str], list[Figure]]:
        """Figures of one work at one size, ours first."""
        found: dict[tuple[str, str], list[Figure]] = {}
        for figure in self.figures:
            found.setdefault((figure.work, figure.case), []).append(figure)
        return {key: sorted(group, key=lambda f: f.role != OURS) for key, group in found.items()}


def read_results(path: Path) -> Results:
    """Read what ``pytest benchmarks/ --benchmark-only --benchmark-json=FILE`` wrote.

    Raises:
        ResultsError: there is no such file, it is not JSON, or not of these benchmarks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ResultsError(f"{path}: is not a benchmark file, not even JSON ({error})") from None
    entries = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ResultsError(f"{path}: is not a benchmark file: it has no list of benchmarks")
    machine = content.get("machine_info") or {}
    try:
        figures = [_figure(entry["extra_info"]) for entry in entries]
        return Results(
            path,
            machine["device"],
            machine["versions"],
            machine["ceilings"],
            figures,
            list(content.get("refused", [])),
            list(content.get("skipped", [])),
        )
    except (KeyError, TypeError) as error:
        raise ResultsError(
            f"{path}: is a benchmark file of something else, or of an older layout: {error} is missing; "
            "make one with pytest benchmarks/ --benchmark-only --benchmark-json=FILE"
        ) from None


def _figure(info: dict[str, Any]) -> Figure:
    info.setdefault("host_seconds", None)
    for name in ("seconds", "over_ours", "device_seconds", "host_seconds"):
        if info[name] is not None:
            info[name] = {label: float(info[name][label]) for label in QUANTILES}
    return Figure(**{name: info[name] for name in Figure.__dataclass_fields__})
