"""A frozen teacher that reads clips in a thread of its own, while the caller's thread trains."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Event, Thread
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from ..data.video import VideoError
from ..extraction.making import RefusedClip, decode, keep, put_on_record, refusal_of, stored_or_refused
from ..extraction.planning import PriorRequest
from ..prior import MotionPrior, PriorError, PriorSettings, extract_prior
from ..store import PriorStore, prior_keys
from ..vdm import Teacher

#: Clips that a teacher may fail on one after the other.
PATIENCE = 8


class DeadTeacherError(RuntimeError):
    """A teacher has failed on `PATIENCE` clips in a row through no fault of theirs."""


@dataclass(frozen=True)
class ReadPrior:
    """A prior that was asked for.

    Attributes:
        prior: the prior.
        fresh: made now, and not found in the store.
        seconds: wall time the teacher spent on it.
        damaged: what was wrong with a stored file that was set aside; empty where nothing was.
        lost: why the store does not keep it, though it was to; see `extraction.making.keep`.
    """

    prior: MotionPrior
    fresh: bool
    seconds: float = 0.0
    damaged: str = ""
    lost: str = ""


class PriorSource(Protocol):
    """Where priors come from while training: a teacher in a thread, or on ranks of its own."""

    def submit(self, request: PriorRequest, settings: PriorSettings | None = None) -> Future[ReadPrior]:
        """Ask for a prior; its error is the future's. With other `settings` than usual it is never kept."""
        ...

    def close(self) -> None:
        """Give up what was asked for and not begun, and wait for the rest."""
        ...


@dataclass(frozen=True)
class _Job:
    request: PriorRequest
    settings: PriorSettings | None
    answer: Future[ReadPrior]


@dataclass(frozen=True)
class _Prepared:
    """A stored prior, or else a clip's frames."""

    content: MotionPrior | np.ndarray
    damaged: str = ""


class TeacherThread:
    """Reads the priors that are asked for, one after the other, in the order they were asked for.

    Nothing here draws from a global random generator: neither what the teacher reads nor when shows in
    the training. On a GPU the teacher runs on a stream of its own. Clips are decoded ahead of it, and priors
    of `store` are read there, in threads besides; at most `decode_workers` + 1 decoded clips are held.

    Clips that can give no prior are put on record in the store and not tried again. From the eighth failure
    in a row on that is no clip's own (memory, the device), until a prior is made, answers are
    `DeadTeacherError`.

    Args:
        teacher: frozen; nothing else may use it until `close`.
        settings: of the priors.
        store: read first, and given what is made; None keeps nothing.
        decode_workers: threads that decode.

    Raises:
        ValueError: decode_workers below 1.
    """

    def __init__(
        self,
        teacher: Teacher,
        settings: PriorSettings,
        *,
        store: PriorStore | None = None,
        decode_workers: int = 2,
    ) -> None:
        if decode_workers < 1:
            raise ValueError(f"decode_workers must be at least 1, got {decode_workers}")
        self.teacher, self.settings, self.store = teacher, settings, store
        self._name = prior_keys(teacher.id, settings)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = Event()
        self._workers = decode_workers
        self._failures = 0
        self._decoders = ThreadPoolExecutor(decode_workers, thread_name_prefix="decode")
        # A new thread would not take over how many threads its caller's arithmetic is split into, and with
        # another split sums may round differently.
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), name="teacher", daemon=True)
        self._thread.start()

    def submit(self, request: PriorRequest, settings: PriorSettings | None = None) -> Future[ReadPrior]:
        """See `PriorSource`."""
        if not self._thread.is_alive():
            raise RuntimeError("the teacher's thread has ended")
        answer: Future[ReadPrior] = Future()
        self._jobs.put(_Job(request, settings, answer))
        return answer

    def close(self) -> None:
        """See `PriorSource`."""
        self._closing.set()
        self._jobs.put(None)
        self._thread.join()
        self._decoders.shutdown(cancel_futures=True)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        waiting: deque[tuple[_Job, Future[_Prepared]]] = deque()
        with _own_stream(self.teacher.device):
            while not self._closing.is_set():
                while len(waiting) <= self._workers and (not waiting or not self._jobs.empty()):
                    job = self._jobs.get()
                    if job is None:
                        break
                    waiting.append((job, self._decoders.submit(self._prepare, job)))
                if waiting and not self._closing.is_set():
                    self._answer(*waiting.popleft())
        for job, _ in waiting:
            job.answer.cancel()
        while not self._jobs.empty():
            if (left := self._jobs.get()) is not None:
                left.answer.cancel()

    def _prepare(self, job: _Job) -> _Prepared:
        damaged = ""
        if self.store is not None and job.settings is None:
            found = stored_or_refused(self.store, job.request.key)
            if isinstance(found, MotionPrior):
                return _Prepared(found)
            damaged = "" if found is None else str(found)
        return _Prepared(decode(job.request, self.teacher), damaged)

    def _answer(self, job: _Job, preparing: Future[_Prepared]) -> None:
        if not job.answer.set_running_or_notify_cancel():
            preparing.cancel()
            return
        try:
            read = self._read(job, preparing.result())
        except BaseException as error:
            job.answer.set_exception(self._blame(job, error))
        else:
            if read.fresh:
                self._failures = 0
            job.answer.set_result(read)

    def _blame(self, job: _Job, error: BaseException) -> BaseException:
        """The error to answer with: a clip's own, or the teacher's, which is counted."""
        if isinstance(error, VideoError | PriorError):
            if self.store is not None and job.settings is None:
                put_on_record(self.store, job.request, refusal_of(error), self._name)
        elif not isinstance(error, RefusedClip):
            self._failures += 1
            if self._failures >= PATIENCE:
                dead = DeadTeacherError(
                    f"the teacher failed on {self._failures} clips in a row, "
                    f"the last time with {type(error).__name__}: {error}"
                )
                dead.__cause__ = error
                return dead
        return error

    def _read(self, job: _Job, prepared: _Prepared) -> ReadPrior:
        if isinstance(prepared.content, MotionPrior):
            return ReadPrior(prepared.content, fresh=False)
        began = perf_counter()
        settings = job.settings or self.settings
        prior = extract_prior(self.teacher, prepared.content, job.request.text, **asdict(settings))
        seconds, lost = perf_counter() - began, ""
        if self.store is not None and job.settings is None:
            lost = keep(self.store, job.request, prior, self._name)
        return ReadPrior(prior, fresh=True, seconds=seconds, damaged=prepared.damaged, lost=lost)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)
    # The weights were copied there on the stream that loaded them.
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
