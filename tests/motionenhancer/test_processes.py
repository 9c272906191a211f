"""Several processes on one machine, as torchrun starts them and `accelerate launch` does on GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_world import World

from motionenhancer import extract
from motionenhancer.store import PriorStore


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def test_two_processes_share_what_is_missing_and_make_the_store_of_one(world: World, tmp_path: Path) -> None:
    flags = {"student": None, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 0
    whole = stored(tmp_path / "one")
    assert len(whole) == 8
    # Half of the work is done before, in front, and one of that is damaged.
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "two", limit=4)) == 0
    store = PriorStore(tmp_path / "two")
    store.path(max(store)).write_bytes(b"damaged")
    # accelerate's own launcher starts several processes on CPUs through MPI only.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    again = world.flags(**flags, prior_dir=tmp_path / "two")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "motionenhancer.extract", *again],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "have their prior" in line]
    assert [line.split()[0] for line in said] == ["8"]
    report = json.loads((tmp_path / "two" / "extraction.json").read_text())
    assert (report["status"], report["processes"]) == ("finished", 2)
    assert (report["stored"], report["made"], sum(report["made_each"])) == (3, 5, 5)
    assert sorted(report["made_each"]) == [2, 3]
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}
    assert stored(tmp_path / "two") == whole
