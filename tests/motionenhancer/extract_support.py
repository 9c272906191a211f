"""What the tests of extraction share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tiny_world import World

from motionenhancer import extract
from motionenhancer.priors.storage import PriorStore
from motionenhancer.toy.world import write_world

REPO = Path(__file__).parents[2]

COMMAND = [sys.executable, "-m", "motionenhancer.extract"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def report_in(folder: Path) -> dict:
    return json.loads((folder / extract.EXTRACTION).read_text())


def damaged_world(world: World, folder: Path, clips: int, bad: int) -> tuple[Path, Path]:
    """A data file of `clips` clips, the last `bad` of them cut short, and its video folder."""
    toy = write_world(folder, clips=clips, test_clips=1, progress=False)
    rows = [json.loads(line) for line in toy.train.read_text().splitlines()]
    for i, row in enumerate(rows[-bad:]):
        path = toy.videos / row["video"]
        body = path.read_bytes()
        path.write_bytes([body[: len(body) // 2], b"", b"not a video" * 50][i % 3])
    return toy.train, toy.videos
