"""Several processes on one machine, as torchrun starts them and `accelerate launch` does on GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from extract_support import stored
from tiny_world import World

from motionenhancer import extract
from motionenhancer.priors.storage import PriorStore


def extract_with_two(flags: list[str]) -> subprocess.CompletedProcess[str]:
    return launch_two(["-m", "motionenhancer.extract", *flags])


def launch_two(program: list[str]) -> subprocess.CompletedProcess[str]:
    # accelerate's own launcher starts several processes on CPUs through MPI only.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launch, *program],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_two_processes_leave_out_and_count_what_one_does(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    videos = tmp_path / "videos"
    shutil.copytree(world.videos, videos)
    for clip in range(3):
        (videos / f"broken{clip}.mp4").write_bytes(b"no video %d" % clip)
        rows += [{**rows[0], "id": f"broken-{clip}-{i}", "video": f"broken{clip}.mp4"} for i in range(2)]
    asked, answer = rows[0]["conversations"]
    rows.append(
        {
            "id": "two",
            "video": [rows[0]["video"], rows[1]["video"]],
            "conversations": [{**asked, "value": f"<video>\n{asked['value']}"}, answer],
        }
    )
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n{not json\n")
    flags = {"student": None, "ddim_steps": 1, "data": data, "video_root": videos}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 1
    done = extract_with_two(world.flags(**flags, prior_dir=tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "extraction.json").read_text()) for name in ("one", "two"))
    assert one["skipped"]["counts"] == {
        "unreadable video": 6,
        "no prior: alignment needs one video": 1,
        "invalid json": 1,
    }
    assert two["skipped"]["counts"] == one["skipped"]["counts"]
    assert {entry["line"] for entry in two["skipped"]["entries"]} == set(range(9, 17))
    assert (two["samples"], two["made"]) == (one["samples"], one["made"]) == (8, 8)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.count("8 skipped:") == 1


def test_two_processes_share_what_is_missing_and_make_the_store_of_one(world: World, tmp_path: Path) -> None:
    flags = {"student": None, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 0
    whole = stored(tmp_path / "one")
    assert len(whole) == 8
    # The first half of the priors is made before, and one of them is damaged.
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "two", limit=4)) == 0
    store = PriorStore(tmp_path / "two")
    store.path(max(store)).write_bytes(b"damaged")
    done = extract_with_two(world.flags(**flags, prior_dir=tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "have their prior" in line]
    assert [line.split()[0] for line in said] == ["8"]
    report = json.loads((tmp_path / "two" / "extraction.json").read_text())
    assert (report["status"], report["processes"]) == ("finished", 2)
    assert (report["stored"], report["made"], sum(report["made_each"])) == (3, 5, 5)
    assert len(report["made_each"]) == 2
    assert report["skipped"]["notes"] == {"damaged priors made anew": 1}
    assert stored(tmp_path / "two") == whole


def test_two_processes_of_which_one_is_killed_end_and_go_on(world: World, tmp_path: Path) -> None:
    flags = {"student": None, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 0
    store = PriorStore(tmp_path / "two")
    # One process is killed after two priors, as if the machine had no memory left.
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from motionenhancer import extract\n"
        "from motionenhancer.priors.storage import PriorStore\n"
        "write = PriorStore.write\n"
        "def dying(store, key, prior):\n"
        "    write(store, key, prior)\n"
        "    if len(list(store)) > 1:\n"
        "        os.kill(os.getpid(), 9)\n"
        "PriorStore.write = dying\n"
        "sys.exit(extract.main(sys.argv[1:]))\n"
    )
    done = launch_two([str(program), *world.flags(**flags, prior_dir=store.folder)])
    assert done.returncode != 0
    assert 2 <= len(stored(store.folder)) < 8
    done = extract_with_two(world.flags(**flags, prior_dir=store.folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert stored(store.folder) == stored(tmp_path / "one")


def test_a_teacher_that_dies_in_one_process_ends_all_with_its_reason(world: World, tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(
        "import os, sys\n"
        "from motionenhancer import extract\n"
        "from motionenhancer.priors import maker, reader\n"
        "real = reader.extract_prior\n"
        "def failing(*args, **options):\n"
        "    raise RuntimeError('CUDA error: device-side assert')\n"
        "maker.PATIENCE = 1\n"
        "reader.extract_prior = failing\n"
        "sys.exit(extract.main(sys.argv[1:]))\n"
    )
    done = launch_two([str(program), *world.flags(student=None, ddim_steps=1, prior_dir=tmp_path / "p")])
    assert done.returncode != 0
    assert (
        "error: the teacher failed on 1 clips in a row, the last time with RuntimeError: CUDA" in done.stderr
    )
    report = json.loads((tmp_path / "p" / "extraction.json").read_text())
    assert report["status"] == "failed"
    assert "the teacher failed on 1 clips in a row" in report["error"]
