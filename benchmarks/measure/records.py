"""The results file of a check: one JSON object a line, written as it becomes known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, **entry: Any) -> None:
    """Add one entry, on the disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All entries, in the order they were written; a last line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(entries: list[dict[str, Any]]) -> str:
    """One line a goal and one a stage."""
    lines = []
    for entry in entries:
        if entry["kind"] == "machine":
            versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
            lines.append(f"{entry['device']}: {versions}")
        elif entry["kind"] == "goal":
            value = "" if entry.get("value") is None else f"{entry['value']:.4g} {entry['unit']}"
            wanted = f" (wanted {entry['wanted']})" if entry["wanted"] else ""
            why = f": {entry['why']}" if entry.get("why") else ""
            lines.append(f"goal   {entry['outcome']:10} {entry['goal']}: {value}{wanted}{why}")
        elif entry["kind"] == "stage":
            why = f": {entry['why']}" if entry["why"] else ""
            lines.append(f"stage  {entry['outcome']:10} {entry['stage']}, {entry['seconds']} s{why}")
    return "\n".join(lines)
