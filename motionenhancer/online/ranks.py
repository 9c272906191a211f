"""Ranks of a launch that hold the teacher and send priors to the ranks that train.

All processes of the launch meet in its rendezvous store. The process group, which accelerate, the Trainer and
whatever engine shards the student take for the whole world, is then made of the training ranks alone: none of
them can wrap, wait for or count the teacher's ranks. Requests and priors travel through the store.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load, save

from ..arguments import PriorArguments
from ..data import Clip, Sample
from ..data.clip import segment_of
from ..data.video import VideoError
from ..extraction.making import keep, put_on_record, refusal_of, stored_or_refused
from ..extraction.planning import PriorRequest
from ..prior import MotionPrior, PriorError, PriorSettings
from ..store import PriorStore, Refusal, prior_from_text, prior_keys, text_of_prior
from ..vdm import Teacher
from .teacher import ready_teacher
from .thread import DeadTeacherError, ReadPrior, TeacherThread

_TIMEOUT = timedelta(minutes=30)
_PENDING = 8


class RemoteTeacherError(ValueError):
    """What went wrong on a teacher's rank, in its own words; `refusal` where it is the clip's own fault."""

    def __init__(self, text: str, refusal: Refusal | None = None) -> None:
        super().__init__(text)
        self.refusal = refusal


@dataclass(frozen=True)
class TeacherRanks:
    """Who is who among a launch's processes.

    Attributes:
        teachers: ranks that hold the teacher, the last ones of the launch.
        trainers: ranks that train.
        index: this process's place among the teachers; None where it trains.
        store: the launch's rendezvous store.
        device: of this process.
    """

    teachers: int
    trainers: int
    index: int | None
    store: dist.Store
    device: torch.device

    def client(self) -> dist.Store:
        """A connection of its own: one that waits would hold up all others that use it."""
        return dist.PrefixStore("priors", self.store).clone()


_ranks: TeacherRanks | None = None


def current() -> TeacherRanks | None:
    """What `split_ranks` made of this launch; None where the teacher has no ranks of its own."""
    return _ranks


def serving() -> bool:
    """Whether this process holds the teacher and does not train."""
    return _ranks is not None and _ranks.index is not None


def split_ranks(teachers: int) -> None:
    """Set the last `teachers` ranks of a launch apart and let the others form the process group.

    Must run before accelerate or the Trainer looks at the launch. On the ranks that train, `WORLD_SIZE` and
    `LOCAL_WORLD_SIZE` then count them alone; on the teacher's, no trace of a launch is left.

    Raises:
        ValueError: fewer than 0, no rank left to train, or a process group that is there already.
    """
    global _ranks
    if teachers < 0:
        raise ValueError(f"--teacher_ranks must be at least 0, got {teachers}")
    if teachers == 0 or _ranks is not None:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= teachers:
        raise ValueError(
            f"--teacher_ranks {teachers} must leave a rank to train, but the launch has {world}; "
            "start more processes with torchrun or accelerate launch"
        )
    if dist.is_initialized():
        raise ValueError("--teacher_ranks must be set before a process group is made, and there is one")
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
    local, trainers = int(os.environ.get("LOCAL_RANK", "0")), world - teachers
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    _ranks = TeacherRanks(teachers, trainers, rank - trainers if rank >= trainers else None, store, device)
    if _ranks.index is not None or (trainers == 1 and not gpu):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    os.environ["WORLD_SIZE"] = str(trainers)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(here, trainers - (rank - local)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=dist.PrefixStore("trainers", store),
        rank=rank,
        world_size=trainers,
        timeout=_TIMEOUT,
    )


# ---- the ranks that train ----


class RemoteTeacher:
    """A `PriorSource` whose teacher is on other ranks: requests queue up, the next free one takes the next.

    Args:
        ranks: from `current`.
        prior: how the teacher is loaded; the first training rank's counts.
        settings: of the priors.
        store: read first, and given what is made; None keeps nothing.
        decode_workers: threads of each teacher's rank that decode clips.
        texts: all that will be asked for; with a text cache they are encoded first.

    Raises:
        RemoteTeacherError: a teacher's rank could not load it; the message says why.
    """

    def __init__(
        self,
        ranks: TeacherRanks,
        prior: PriorArguments,
        settings: PriorSettings,
        *,
        store: PriorStore | None = None,
        decode_workers: int = 2,
        texts: Sequence[str] = (),
    ) -> None:
        self.ranks, self.store = ranks, store
        if store is not None:
            self._name = prior_keys(prior.teacher_id(PartialState().device), settings)
        self._closing, self._local = Event(), threading.local()
        self._pool = ThreadPoolExecutor(_PENDING, thread_name_prefix="remote teacher")
        client = ranks.client()
        if not dist.is_initialized() or dist.get_rank() == 0:
            setup = {
                "prior": asdict(prior),
                "settings": asdict(settings),
                "decode_workers": decode_workers,
                "use_cpu": PartialState().device.type == "cpu",
                "texts": list(texts) if prior.text_cache is not None else [],
            }
            client.set("setup", json.dumps(setup))
        loading, pause = set(range(ranks.teachers)), 0.002
        while loading:
            # Whichever is first: one that failed is not to be heard of only after one that still loads.
            for index in [index for index in sorted(loading) if client.check([f"ready/{index}"])]:
                problem = client.get(f"ready/{index}").decode()
                if problem:
                    raise RemoteTeacherError(problem)
                loading.remove(index)
            if loading:
                time.sleep(pause)
                pause = min(0.05, pause * 1.5)

    def submit(self, request: PriorRequest, settings: PriorSettings | None = None) -> Future[ReadPrior]:
        """See `PriorSource`."""
        return self._pool.submit(self._fetch, request, settings)

    def _fetch(self, request: PriorRequest, settings: PriorSettings | None) -> ReadPrior:
        keeps, damaged = self.store if settings is None else None, ""
        if keeps is not None:
            found = stored_or_refused(keeps, request.key)
            if isinstance(found, MotionPrior):
                return ReadPrior(found, fresh=False)
            damaged = "" if found is None else str(found)
        if not hasattr(self._local, "client"):
            self._local.client = self.ranks.client()
        client = self._local.client
        ticket = client.add("tickets", 1)
        job = {
            "id": request.sample.id,
            "video": str(Path(request.video).absolute()),
            "segment": [getattr(request.video, name, None) for name in ("start", "end")],
            "text": request.text,
            "settings": None if settings is None else asdict(settings),
        }
        client.set(f"job/{ticket}", json.dumps(job))
        try:
            read = unpack_answer(_take(client, f"answer/{ticket}", self._closing))
        except RemoteTeacherError as error:
            if keeps is not None and error.refusal is not None:
                put_on_record(keeps, request, error.refusal, self._name)
            raise
        lost = "" if keeps is None else keep(keeps, request, read.prior, self._name)
        return ReadPrior(read.prior, fresh=True, seconds=read.seconds, damaged=damaged, lost=lost)

    def close(self) -> None:
        """See `PriorSource`."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def letting_teachers_go(ranks: TeacherRanks | None = None) -> Iterator[None]:
    """Around a training: the teacher's ranks end when all training ranks have left it, whichever way.

    Args:
        ranks: by default those of this launch, if it has any.
    """
    try:
        yield
    finally:
        if (ranks := ranks or current()) is not None:
            _release(ranks)


def _release(ranks: TeacherRanks) -> None:
    client = ranks.client()
    if client.add("closed", 1) < ranks.trainers:
        return
    if not client.check(["setup"]):
        client.set("setup", "null")
    for _ in range(ranks.teachers):
        client.set(f"job/{client.add('tickets', 1)}", "null")
    # The first rank may be the one that holds the store: it stays until the others need it no more. One that
    # still loads after another has failed finds out by itself that it is needed no more.
    ready = [client.get(key) for i in range(ranks.teachers) if client.check([key := f"ready/{i}"])]
    failed = any(ready)
    for index in range(ranks.teachers):
        if not failed or client.check([f"ready/{index}"]):
            _take(client, f"left/{index}", Event())


# ---- the teacher's ranks ----


def serve_priors(ranks: TeacherRanks | None = None) -> int:
    """Answer requests until all training ranks have let go; returns the process's exit code.

    Args:
        ranks: by default those of this launch.
    """
    ranks = ranks or current()
    assert ranks is not None
    client = ranks.client()
    try:
        try:
            setup = json.loads(_take(client, "setup", Event(), keep=True))
            return 0 if setup is None else _serve(ranks, client, setup)
        finally:
            client.set(f"left/{ranks.index}", "")
    except dist.DistError as error:
        reason = f"the launch has ended ({error})"
        print(f"error: teacher rank {ranks.index}: {reason}", file=sys.stderr, flush=True)
        return 2


def _serve(ranks: TeacherRanks, client: dist.Store, setup: dict[str, Any]) -> int:
    assert ranks.index is not None
    prior, settings = PriorArguments(**setup["prior"]), _settings(setup["settings"])
    device = torch.device("cpu") if setup["use_cpu"] else ranks.device

    def encoded() -> None:
        client.set(f"encoded/{ranks.index}", "")
        for index in range(ranks.teachers):
            _take(client, f"encoded/{index}", Event(), keep=True)

    try:
        teacher = ready_teacher(
            prior, settings, device, setup["texts"], index=ranks.index, count=ranks.teachers, wait=encoded
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        # Said here too: the launcher may end the training ranks before they have read it.
        print(f"error: teacher rank {ranks.index}: {reason}", file=sys.stderr, flush=True)
        client.set(f"ready/{ranks.index}", reason)
        client.set(f"encoded/{ranks.index}", "")
        return 2
    client.set(f"ready/{ranks.index}", "")
    for ticket, job, answer in _jobs(ranks, teacher, settings, setup["decode_workers"]):
        start, end = job["segment"]
        video = segment_of(Clip(Path(job["video"]), start, end))
        request = PriorRequest(Sample(job["id"], [], (video,)), video, job["text"], "")
        answer(ticket, request, None if job["settings"] is None else _settings(job["settings"]))
    return 0


def _jobs(
    ranks: TeacherRanks, teacher: Teacher, settings: PriorSettings, workers: int
) -> Iterator[tuple[int, dict[str, Any], Callable[[int, PriorRequest, PriorSettings | None], None]]]:
    """Claim jobs one by one, a few more than are being read, and hand each out with what answers it."""
    thread = TeacherThread(teacher, settings, decode_workers=workers)
    slots, client, sender = BoundedSemaphore(workers + 1), ranks.client(), ranks.client()

    def answer(ticket: int, request: PriorRequest, other: PriorSettings | None) -> None:
        def send(done: Future[ReadPrior]) -> None:
            try:
                sender.set(f"answer/{ticket}", pack_answer(done))  # type: ignore[arg-type]
            finally:
                slots.release()

        thread.submit(request, other).add_done_callback(send)

    try:
        while True:
            slots.acquire()
            ticket = client.add("claims", 1)
            job = json.loads(_take(client, f"job/{ticket}", Event()))
            if job is None:
                return
            yield ticket, job, answer
    finally:
        thread.close()


def _settings(fields: dict[str, Any]) -> PriorSettings:
    weights = fields["step_weights"]
    return PriorSettings(**{**fields, "step_weights": None if weights is None else tuple(weights)})


# ---- what travels ----


def pack_answer(done: Future[ReadPrior]) -> bytes:
    """A prior, or what went wrong instead, as bytes: safetensors with the rest as json."""
    error = done.exception()
    if error is not None:
        refusal = asdict(refusal_of(error)) if isinstance(error, VideoError | PriorError) else None
        dead = isinstance(error, DeadTeacherError)
        text = str(error) if dead else f"{type(error).__name__}: {error}"
        return save({"error": _bytes(json.dumps({"text": text, "refusal": refusal, "dead": dead}))})
    read = done.result()
    about = json.dumps(
        {"text": text_of_prior(read.prior), "seconds": read.seconds, "stages": read.prior.seconds}
    )
    return save({"attention": read.prior.attention.contiguous(), "about": _bytes(about)})


def unpack_answer(data: bytes) -> ReadPrior:
    """The other way round.

    Raises:
        RemoteTeacherError: what went wrong.
        DeadTeacherError: as it has with one clip after another.
    """
    parts = load(data)
    if "error" in parts:
        problem = json.loads(_text(parts["error"]))
        if problem["dead"]:
            raise DeadTeacherError(problem["text"])
        refusal = problem["refusal"]
        raise RemoteTeacherError(problem["text"], None if refusal is None else Refusal(**refusal))
    about = json.loads(_text(parts["about"]))
    prior = prior_from_text(parts["attention"], about["text"])
    prior.seconds.update(about["stages"])
    return ReadPrior(prior, fresh=True, seconds=about["seconds"])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(tensor: torch.Tensor) -> str:
    return tensor.numpy().tobytes().decode()


def _take(client: dist.Store, key: str, closing: Event, *, keep: bool = False) -> bytes:
    """Wait for a key and take it out; asked again and again, as one long wait could not be given up."""
    pause = 0.002
    while not client.check([key]):
        if closing.is_set():
            raise RemoteTeacherError("the run is ending")
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    value = client.get(key)
    if not keep:
        client.delete_key(key)
    return value
