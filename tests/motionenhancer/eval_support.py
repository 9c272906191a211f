"""The evaluation command as tests call it, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from motionenhancer import eval as evaluate
from motionenhancer.toy.world import ToyFolder

DATA = Path(__file__).parent / "data_eval"
MOTIONBENCH, FAVOR = DATA / "video_info.meta.jsonl", DATA / "video_perspective.json"


def main(out: Path, **options: Any) -> int:
    flags = {"bootstrap_samples": 200, **options, "output_dir": out}
    return evaluate.main(
        [
            str(part)
            for name, value in flags.items()
            if value is not None
            for part in ((f"--{name}",) if value is True else (f"--{name}", *_listed(value)))
        ]
    )


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def scores_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())


def results_of(out: Path) -> dict[str, Any]:
    return {r["id"]: r for r in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def predict(folder: Path, answers: dict[str, Any]) -> Path:
    file = folder / "predictions.json"
    file.write_text(json.dumps(answers))
    return file


def student_flags(student: Path, toy: ToyFolder) -> dict[str, Any]:
    return {
        "student": student,
        "benchmark": "favor",
        "data": FAVOR,
        "video_root": toy.videos,
        "batch_size": 2,
        "max_new_tokens": 6,
        "video_fps": 4,
    }


def files_of(out: Path) -> dict[str, bytes]:
    return {n: (out / n).read_bytes() for n in ("results.jsonl", "scores.json", "submission.jsonl")}
