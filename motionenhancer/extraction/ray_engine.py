"""An extraction on a Ray cluster: the same plan, the same store, one actor a GPU.

Ray Data is not used. A clip that kills the worker that decodes it (a fault in a codec, memory) is tried by
Ray Data again and again, and its errors name blocks of rows, not rows; here such a clip is found, counted and
left out. Importing this module needs Ray.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from ..store import Refusal
from ..vdm import Teacher
from .engines import Done, priors_bar, stored_bar
from .job import Job, Looked, Result
from .workload import Share, Workload, key_of

#: Deaths that a clip may cause, alone on its worker, before it is left out.
TRIES = 2
#: Deaths in a row, with nothing done between them, after which the run is given up.
PATIENCE = 12
#: Most keys that a worker is given at a time, to make and to check.
MAKE, CHECK = 8, 256


class PriorWorker:
    """What runs in an actor: it checks priors, and makes them with a teacher that is loaded when needed."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.teacher: Teacher | None = None

    def ready(self, mark: Path, size: int, teacher: str) -> Iterator[None]:
        """End once the worker is there.

        Raises:
            ValueError: its node does not see what the driver sees, or has no GPU.
        """
        job, unseen = self.job, ""
        if not job.data.is_file() or job.data.stat().st_size != size:
            unseen = f"--data {job.data}"
        elif job.video_root is not None and not job.video_root.is_dir():
            unseen = f"--video_root {job.video_root}"
        elif not mark.is_file():
            unseen = f"--prior_dir {job.prior.prior_dir}"
        elif not Path(str(job.prior.teacher)).is_dir() or job.prior.teacher_id(self.device) != teacher:
            unseen = f"--teacher {job.prior.teacher}"
        node = ray.util.get_node_ip_address()
        if unseen:
            raise ValueError(
                f"{unseen}: a worker on node {node} does not see what stands there where the command was "
                "started; with --engine ray all nodes need the same files at the same paths"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"a worker on node {node} has no GPU that it can use")
        yield from ()

    def check(self, share: Share) -> Iterator[Looked]:
        yield from self.job.check(share)

    def make(self, share: Share, measure: bool) -> Iterator[Result]:
        if self.teacher is None:
            self.teacher = self.job.load(self.device)
        prior = replace(self.job.prior, measure_roundtrip=measure)
        yield from replace(self.job, prior=prior).make(share, self.teacher)


@dataclass
class _Task:
    """What a worker is busy with. `done`: how many of its keys came back; `alone`: it is on trial."""

    worker: Any
    share: Share | None = None
    alone: bool = False
    done: int = 0


@dataclass
class _Pieces:
    """A share of the work in pieces, small ones toward the end so that all workers finish together.

    Keys that a worker died with come again, one at a time, so that a clip that kills workers is found out.
    """

    share: Share
    most: int
    workers: int
    at: int = 0
    again: deque[Share] = field(default_factory=deque)
    deaths: dict[int, int] = field(default_factory=dict)

    def next(self) -> tuple[Share, bool] | None:
        """The next piece, and whether it is a single key on trial."""
        if self.again:
            return self.again.popleft(), True
        left = len(self.share) - self.at
        if not left:
            return None
        size = max(1, min(self.most, left // (4 * self.workers)))
        self.at += size
        return self.share[self.at - size : self.at], False

    @property
    def empty(self) -> bool:
        """Whether there is no further piece, unless a worker dies."""
        return self.at == len(self.share) and not self.again

    def died(self, task: _Task) -> int | None:
        """Take back what a dead worker had left; returns a key that is given up."""
        assert task.share is not None
        left = task.share[task.done :]
        if task.alone and len(left):
            index = int(left.indices[0])
            self.deaths[index] = self.deaths.get(index, 0) + 1
            if self.deaths[index] >= TRIES:
                return index
        self.again.extend(left.split())
        return None


@dataclass
class RayEngine:
    """The workers of a cluster.

    Attributes:
        device: what each has a teacher on.
        workers: how many.
        cpus: cores that each is given.
    """

    device: torch.device
    workers: int
    cpus: int = 1

    def run(self, job: Job, work: Workload) -> Done:
        job = _absolute(job)
        done, lost = Done(), []
        folder = job.store.folder
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".seen-by-workers.{secrets.token_hex(8)}.tmp"
        mark.touch()
        assert job.prior.teacher is not None
        seen = (mark, job.data.stat().st_size, job.prior.teacher_id(self.device))
        crew = _Crew(self, job, seen, done)
        try:
            with stored_bar(len(work.stored()), True) as bar:
                for looked in crew.work("check", _Pieces(work.take(work.stored()), CHECK, self.workers), bar):
                    if isinstance(looked, int):
                        looked = Looked(looked, False)
                    done.look(looked)
                    if not looked.good:
                        lost.append(looked.number)
                    bar.update()
            work.lost(lost)
            missing = work.take(work.missing())
            with priors_bar(done.stored, len(missing), True) as bar:
                for result in crew.work("make", _Pieces(missing, MAKE, self.workers), bar):
                    if isinstance(result, int):
                        died = f"{TRIES} workers died while they had nothing but it"
                        why = Refusal("no prior: its clip kills the worker", died)
                        job.store.refuse(key_of(work.firsts[result]), why)
                        result = Result(result, why.reason, why.detail)
                    done.add(result)
                    bar.update()
        finally:
            crew.dismiss()
            mark.unlink(missing_ok=True)
        return done


class _Crew:
    """Actors that are given pieces of work as they come back from the last one, and replaced as they die."""

    def __init__(self, engine: RayEngine, job: Job, seen: tuple[Path, int, str], done: Done) -> None:
        self.engine, self.seen, self.done = engine, seen, done
        self.job, self.measure = ray.put(job), job.prior.measure_roundtrip
        self.busy: dict[Any, _Task] = {}
        self.idle: list[Any] = []
        self.fruitless = 0

    def work(self, method: str, pieces: _Pieces, bar: tqdm) -> Iterator[Any]:
        """What `method` gives for every key of `pieces`, as it comes; for a key given up, its index.

        Raises:
            ChildProcessError: workers die one after another.
            Exception: whatever a worker raised.
        """
        if not len(pieces.share):
            return
        for _ in range(self.engine.workers - len(self.idle) - len(self.busy)):
            self._hire()
        while True:
            while self.idle and (piece := pieces.next()):
                self._give(self.idle.pop(), method, *piece)
            starting = sum(task.share is None for task in self.busy.values())
            if starting == len(self.busy) and pieces.empty:
                return
            notes = {"starting": starting, "died": self.done.deaths, "left out": len(self.done.refused)}
            bar.set_postfix({name: count for name, count in notes.items() if count})
            (stream,), _ = ray.wait(list(self.busy), num_returns=1)
            yield from self._next(stream, pieces)

    def _next(self, stream: Any, pieces: _Pieces) -> Iterator[Any]:
        """What the next message of a worker says."""
        task = self.busy[stream]
        try:
            message = ray.get(next(stream))
        except StopIteration:
            del self.busy[stream]
            self.idle.append(task.worker)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            del self.busy[stream]
            self.done.deaths += 1
            self.fruitless += 1
            with suppress(RayError):
                ray.kill(task.worker)
            if self.fruitless >= PATIENCE:
                raise ChildProcessError(
                    f"{self.fruitless} Ray workers died one after another, the last of: {error}"
                ) from error
            if task.share is not None and (given_up := pieces.died(task)) is not None:
                yield given_up
            self._hire()
        else:
            task.done += 1
            self.fruitless = 0
            yield message

    def _hire(self) -> None:
        # Whoever tidies the store meanwhile may take the mark for one of a run that died.
        self.seen[0].touch()
        gpus = 1 if self.engine.device.type == "cuda" else 0
        # A new actor for one that died, not a restart of it: it may find its place on another node, and is
        # given nothing before it is there.
        actor = ray.remote(PriorWorker).options(
            num_cpus=self.engine.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        worker = actor.remote(self.job, self.engine.device.type)
        ready: Any = worker.ready
        self.busy[ready.options(num_returns="streaming").remote(*self.seen)] = _Task(worker)

    def _give(self, worker: Any, method: str, share: Share, alone: bool) -> None:
        call = getattr(worker, method).options(num_returns="streaming")
        extra = () if method == "check" else (self.measure and self.done.roundtrip is None,)
        self.busy[call.remote(share, *extra)] = _Task(worker, share, alone)

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self.idle, *(task.worker for task in self.busy.values())]:
            with suppress(RayError):
                ray.kill(worker)


def _absolute(job: Job) -> Job:
    """Workers have folders of their own to start in."""
    assert job.prior.teacher is not None
    cache = job.prior.text_cache
    prior = replace(
        job.prior,
        teacher=os.path.abspath(job.prior.teacher),
        prior_dir=os.path.abspath(job.prior.prior_dir),
        text_cache=None if cache is None else os.path.abspath(cache),
    )
    root = None if job.video_root is None else job.video_root.absolute()
    return replace(job, data=job.data.absolute(), video_root=root, prior=prior)


@contextmanager
def ray_engine(address: str | None, workers: int | None, cpus: int) -> Iterator[RayEngine]:
    """Join a Ray cluster, or start one on this machine that ends with the run.

    Args:
        address: of the cluster; None takes `RAY_ADDRESS`, then one that runs on this machine, then a new one.
        workers: how many; None is one a GPU of the cluster, or one if there is no GPU.
        cpus: cores that each reserves and computes with.

    Raises:
        ValueError: there is no cluster at the address, or none can be started.
    """
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            # Ray raises a bare Exception where a node does not start in time.
            where = "no cluster could be started here" if address is None else f"--ray_address {address}"
            raise ValueError(f"--engine ray: {where} ({error})") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        yield RayEngine(torch.device("cuda" if gpus else "cpu"), workers or max(1, gpus), cpus)
    finally:
        if not joined:
            ray.shutdown()
