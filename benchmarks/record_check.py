"""What scripts/gpu_check.sh writes and prints of its results file.

``record_check.py FILE machine`` adds device and versions; ``record_check.py FILE stage NAME OUTCOME SECONDS
WHY`` adds how a stage ended, ``record_check.py FILE summary`` prints all of it, one line a goal and a stage.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import records


def main(name: str, command: str, *rest: str) -> int:
    """Run one command."""
    path = Path(name)
    if command == "machine":
        from measure import device

        when = datetime.now(UTC).isoformat(timespec="seconds")
        records.append(path, kind="machine", device=device.name(), versions=device.versions(), when=when)
    elif command == "stage":
        stage, outcome, seconds, why = rest
        records.append(path, kind="stage", stage=stage, outcome=outcome, seconds=int(seconds), why=why)
    else:
        print(records.summary(records.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
