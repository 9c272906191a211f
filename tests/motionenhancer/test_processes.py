"""Several processes on one machine, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_world import World

from motionenhancer.store import PriorStore


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def test_two_processes_make_the_store_of_one(world: World, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        flags = world.flags(student=None, prior_dir=tmp_path / name, ddim_steps=1, limit=4)
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count)]
        done = subprocess.run(
            [sys.executable, *launch, "--num_machines", "1", "-m", "motionenhancer.extract", *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made = sorted(line.split()[0] for line in done.stdout.splitlines() if "have their prior" in line)
        assert made == ["4"] if count == 1 else ["2", "2"]
    assert len(stored(tmp_path / "one")) == 4
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
