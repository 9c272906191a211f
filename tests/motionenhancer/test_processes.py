"""Several processes on one machine, as torchrun starts them and `accelerate launch` does on GPUs."""

from __future__ import annotations

import json
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
        # accelerate's own launcher starts several processes on CPUs through MPI only.
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        done = subprocess.run(
            [sys.executable, *launch, "-m", "motionenhancer.extract", *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = [line for line in done.stdout.splitlines() if "have their prior" in line]
        assert [line.split()[0] for line in said] == ["4"]
        report = json.loads((tmp_path / name / "extraction.json").read_text())
        assert (report["status"], report["processes"], report["made"]) == ("finished", count, 4)
    assert len(stored(tmp_path / "one")) == 4
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
