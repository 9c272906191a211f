"""Extraction on a Ray cluster: the store of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tiny_world import World

from motionenhancer import extract
from motionenhancer.arguments import PriorArguments
from motionenhancer.data import SkipLog, read_samples
from motionenhancer.extraction.engines import Done
from motionenhancer.extraction.job import Job, Result
from motionenhancer.extraction.planning import stream_requests
from motionenhancer.extraction.workload import ITEM, Share, Workload, tabulate
from motionenhancer.store import PriorStore

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install motionenhancer[ray]")

from motionenhancer.extraction import ray_engine  # noqa: E402
from motionenhancer.extraction.ray_engine import PriorWorker, RayEngine, _Pieces, _Task  # noqa: E402

REPO = Path(__file__).parents[2]


def stored(folder: Path) -> dict[str, bytes]:
    store = PriorStore(folder)
    return {key: store.path(key).read_bytes() for key in store}


def workers_under(parent: int) -> list[int]:
    """Processes of Ray actors that descend from a process."""
    parents, actors = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if title.startswith(b"ray::PriorWorker"):
            actors.append(int(entry.name))

    def descends(pid: int) -> bool:
        while pid in parents and pid != parent:
            pid = parents[pid]
        return pid == parent

    return [pid for pid in actors if descends(pid)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster on this machine, started as the command starts one."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # On a busy machine workers at Ray's own niceness of 15 would hardly ever start.
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        for tries in range(3):
            try:
                stack.enter_context(ray_engine.ray_engine("local", None, 1))
                break
            except ValueError as error:
                # Ray gives a node 30 seconds to start, which is not always enough beside other work.
                if tries == 2 or "timed out during startup" not in str(error):
                    raise
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        stack.callback(ray.cloudpickle.unregister_pickle_by_value, sys.modules[__name__])
        yield ray.get_runtime_context().gcs_address
    assert not ray.is_initialized()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Ray's processes in /proc")
def test_a_worker_killed_on_the_way_changes_nothing(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    more = [json.loads(json.dumps({**row, "id": f"{row['id']}-{n}"})) for n in range(3) for row in rows]
    for i, row in enumerate(more):
        # Another text is another prior; some are wanted twice.
        row["conversations"][-1]["value"] += " Again." * (i // 10)
    (world.videos / "broken.mp4").write_bytes(b"no video")
    more[4]["video"] = "broken.mp4"
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in more) + "{not json\n")
    flags = {"student": None, "data": data, "ddim_steps": 1}
    assert extract.main(world.flags(**flags, prior_dir=tmp_path / "one")) == 1

    # Some of the work is done before, and some of that is damaged.
    began = world.flags(**flags, prior_dir=tmp_path / "ray", limit=5)
    assert extract.main(began) == 1
    hurt = min(stored(tmp_path / "ray"))
    PriorStore(tmp_path / "ray").path(hurt).write_bytes(b"damaged")
    before = len(stored(tmp_path / "ray"))

    command = [sys.executable, "-m", "motionenhancer.extract", "--engine", "ray", "--ray_workers", "2"]
    process = subprocess.Popen(
        [*command, *world.flags(**flags, prior_dir=tmp_path / "ray")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    store = PriorStore(tmp_path / "ray")
    while process.poll() is None and len(list(store)) < before + 2:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1][-3000:]
    killed = random.Random(0).choice(workers_under(process.pid))
    os.kill(killed, signal.SIGKILL)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 1, errors[-3000:]
    assert stored(tmp_path / "ray") == stored(tmp_path / "one")
    one, other = (json.loads((tmp_path / name / extract.REPORT).read_text()) for name in ("one", "ray"))
    assert other["worker_deaths"] == 1
    assert other["skipped"]["notes"] == {"damaged priors made anew": 1}
    assert (
        other["skipped"]["counts"] == one["skipped"]["counts"] == {"unreadable video": 1, "invalid json": 1}
    )
    assert sorted(other["skipped"]["entries"], key=str) == sorted(one["skipped"]["entries"], key=str)
    assert other["samples"] == one["samples"] == len(more) - 1
    # A prior that was written by the one that died may be counted as made or not, and is not made wrong.
    assert other["stored"] == before - 1
    assert other["made"] == len(stored(tmp_path / "one")) - other["stored"]
    assert "samples have their prior" in out
    assert "damaged prior set aside" in errors + out


@dataclass(frozen=True)
class OddJob(Job):
    """Makes nothing; kills its worker, or raises, at some samples."""

    deadly: tuple[str, ...] = ()
    failing: tuple[str, ...] = ()

    def load(self, device: Any) -> Any:
        return "teacher"

    def make(self, share: Share, teacher: Any) -> Iterator[Result]:
        for number, request in zip(share.indices, self.requests(share), strict=True):
            if request.sample.id in self.deadly:
                os._exit(1)
            if request.sample.id in self.failing:
                raise OSError("no space left on device")
            yield Result(int(number), "unreadable video" if request.sample.line == 2 else "")


def odd_job(world: World, tmp_path: Path, **odd: tuple[str, ...]) -> tuple[OddJob, Workload, list[str]]:
    prior = PriorArguments(teacher=str(world.teacher), prior_dir=str(tmp_path / "priors"))
    job = OddJob(world.data, world.videos, prior, 1, **odd)
    samples = list(read_samples(world.data, world.videos, SkipLog()))
    requests = stream_requests(samples, "t", prior.settings(), "both", SkipLog())
    return job, Workload.of([tabulate(requests, job.store)]), [sample.id for sample in samples]


def test_a_clip_that_kills_its_workers_is_left_out_and_no_other(
    cluster: str, world: World, tmp_path: Path
) -> None:
    job, work, ids = odd_job(world, tmp_path)
    job = OddJob(job.data, job.video_root, job.prior, 1, deadly=(ids[4],))
    done = RayEngine(torch.device("cpu"), 1).run(job, work)
    refused = {next(iter(job.places(work.samples(r.number))))[0]: r.reason for r in done.refused}
    assert refused == {ids[1]: "unreadable video", ids[4]: "no prior: its clip kills the worker"}
    assert done.made == len(ids) - 2
    assert done.deaths in (ray_engine.TRIES, ray_engine.TRIES + 1)
    left = [path.name for path in (tmp_path / "priors").rglob("*") if path.is_file()]
    assert [name.endswith(".none.json") for name in left] == [True]


def test_what_a_worker_raises_ends_the_run(cluster: str, world: World, tmp_path: Path) -> None:
    job, work, ids = odd_job(world, tmp_path)
    job = OddJob(job.data, job.video_root, job.prior, 1, failing=(ids[3],))
    with pytest.raises(OSError, match="no space left"):
        RayEngine(torch.device("cpu"), 1).run(job, work)


def test_workers_that_keep_dying_end_the_run(
    cluster: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "PATIENCE", 1)
    job, work, ids = odd_job(world, tmp_path)
    job = OddJob(job.data, job.video_root, job.prior, 1, deadly=tuple(ids))
    with pytest.raises(ChildProcessError, match="1 Ray workers died one after another"):
        RayEngine(torch.device("cpu"), 1).run(job, work)


@pytest.mark.parametrize("flag", ["data", "video_root", "prior_dir", "teacher"])
def test_a_worker_that_does_not_see_the_files_says_which(
    cluster: str, world: World, tmp_path: Path, flag: str
) -> None:
    prior = PriorArguments(teacher=str(world.teacher), prior_dir=str(tmp_path))
    mark = tmp_path / "mark"
    mark.touch()
    size = world.data.stat().st_size
    places = {"data": world.data, "video_root": world.videos}
    assert (
        list(PriorWorker(Job(*places.values(), prior, 1), "cpu").ready(mark, size, prior.teacher_id("cpu")))
        == []
    )
    gone = tmp_path / "gone"
    if flag in places:
        places[flag] = gone
    else:
        setattr(prior, flag, str(gone))
    if flag == "prior_dir":
        mark = gone / "mark"
    name = PriorArguments(teacher=str(world.teacher)).teacher_id("cpu")
    worker = PriorWorker(Job(*places.values(), prior, 1), "cpu")
    with pytest.raises(
        ValueError, match=f"--{flag} .*gone: a worker on node .* the same files at the same paths"
    ):
        list(worker.ready(mark, size, name))


def share_of(count: int) -> Share:
    return Share(np.arange(count), np.zeros(count, ITEM))


def test_a_worker_hired_late_finds_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store prune` takes an old mark for one of a run that died."""
    mark = tmp_path / ".seen-by-workers.tmp"
    monkeypatch.setattr(ray_engine.ray, "put", lambda job: job)
    monkeypatch.setattr(ray_engine.ray, "remote", lambda cls: MagicMock())
    job = MagicMock()
    crew = ray_engine._Crew(RayEngine(torch.device("cpu"), 1), job, (mark, 0, "id"), Done())
    crew._hire()
    assert mark.is_file()


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 2), (7, 3), (200, 4)])
def test_pieces_hold_everything_once_and_end_small(count: int, workers: int) -> None:
    pieces, sizes, found = _Pieces(share_of(count), 8, workers), [], []
    while piece := pieces.next():
        assert not piece[1]
        sizes.append(len(piece[0]))
        found += piece[0].indices.tolist()
    assert pieces.empty
    assert found == list(range(count))
    assert sizes == sorted(sizes, reverse=True)
    if count > 100:
        assert sizes[0] == 8
        assert sizes[-3 * workers :] == [1] * (3 * workers)


def test_what_a_dead_worker_had_left_comes_again_alone_and_is_given_up_alone() -> None:
    pieces = _Pieces(share_of(64), 8, 2)
    first = pieces.next()
    assert first is not None
    assert len(first[0]) == 8
    assert pieces.died(_Task("worker", *first, done=5)) is None
    again = [pieces.next() for _ in range(3)]
    assert [(piece[0].indices.tolist(), piece[1]) for piece in again if piece] == [
        ([5], True),
        ([6], True),
        ([7], True),
    ]
    assert pieces.died(_Task("worker", *again[1])) is None  # type: ignore[misc]
    last = pieces.next()
    assert last is not None
    assert last[0].indices.tolist() == [6]
    assert pieces.died(_Task("worker", *last)) == 6
    rest = pieces.next()
    assert rest is not None
    assert rest[0].indices[0] == 8


@pytest.mark.parametrize(
    "flags",
    [
        ["--engine", "ray", "--ray_workers", "0"],
        ["--ray_workers", "2"],
        ["--ray_address", "a:1"],
        ["--ray_cpus", "2"],
    ],
)
def test_bad_flags_are_named(world: World, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        extract.main([*world.flags(student=None), *flags])
    assert stop.value.code == 2
    assert flags[-2] in capsys.readouterr().err
