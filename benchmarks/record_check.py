"""Write what scripts/gpu_check.sh found: ``record_check.py FILE stage=outcome=seconds=why ...``."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path


def main(path: str, *outcomes: str) -> int:
    from measure import device

    stages = []
    for outcome in outcomes:
        stage, result, seconds, why = outcome.split("=", 3)
        stages.append({"stage": stage, "outcome": result, "seconds": int(seconds), "why": why})
    content = {
        "device": device.name(),
        "versions": device.versions(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": stages,
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
