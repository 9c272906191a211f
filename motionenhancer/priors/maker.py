"""The makers of priors. Callers submit a request for a prior and get a future."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import TIMEOUT_MAX, Lock, RLock, Timer
from time import time
from typing import Protocol, TypeVar

import torch

from ..data import Sample, SkipLog
from ..data.video import Video, VideoError, content_digest
from ..teachers import Teacher
from ..threads import Threads
from .prior import PARTLY_UNKNOWN, MotionPrior, PriorError
from .prior_settings import PriorSettings
from .reader import Reader, Source
from .requests import Made, PriorRequest, clip_name, request_key
from .storage import DamagedPrior, PriorStore, Refusal

PATIENCE = 8
"""A teacher counts as dead when it fails on this many clips in a row and the clips are not the cause."""

WAIT = 3600
"""Default limit in seconds, for one prior and for the time without any teacher in a Ray cluster."""

Item = TypeVar("Item")


class DeadTeacher(RuntimeError):
    """No prior can be made any more, so the run must stop; the message says why."""


class RefusedClip(ValueError):
    """The store has a record that this clip and text give no prior; `refusal` has the reason."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        return self.refusal.detail


class PriorMaker(Protocol):
    """Makes priors. It works on `capacity` requests at once; further requests wait."""

    capacity: int

    def submit(self, request: PriorRequest) -> Future[Made]:
        """Request a prior.

        Errors of the future: `VideoError` or `PriorError` if the clip or text is the cause, `DeadTeacher` if
        no more priors can be made, any other error for a failure of this attempt.
        """

    def close(self) -> None:
        """Cancel requests that have not begun, and wait for the others."""


@dataclass
class Patience:
    """Declares a teacher dead after `PATIENCE` consecutive failures that were not caused by clips."""

    failures: int = 0

    def judge(self, error: Exception) -> Exception:
        """Count a failed attempt; return the error for the caller. A finished prior sets `failures` to 0."""
        if isinstance(error, VideoError | PriorError | DeadTeacher):
            return error
        self.failures += 1
        if self.failures < PATIENCE:
            return error
        dead = DeadTeacher(
            f"the teacher failed on {self.failures} clips in a row, "
            f"the last time with {type(error).__name__}: {' '.join(str(error).split())}"
        )
        dead.__cause__ = error
        return dead


class LocalMaker:
    """A teacher in a thread of this process; on a GPU it runs on its own stream.

    Requests are answered in the order of submission. Threads decode clips ahead; at most `decode_workers` + 1
    decoded clips are held. No global random generator is used. So a prior does not depend on the time when it
    is made, and training does not depend on priors that are made at the same time.

    Every wait has a limit: the teacher counts as dead if it does not answer a request within `wait` seconds.

    Args:
        load: returns the teacher; called once, at the first request.
        settings: settings of the priors.
        decode_workers: number of threads that decode.
        roundtrip: also measure the inversion error of the first clip.
        wait: maximum of seconds for one prior, from the moment when the teacher turns to it.

    Raises:
        ValueError: decode_workers below 1.
    """

    def __init__(
        self,
        load: Callable[[], Teacher | Source],
        settings: PriorSettings,
        *,
        decode_workers: int = 2,
        roundtrip: bool = False,
        wait: float = WAIT,
    ) -> None:
        if decode_workers < 1:
            raise ValueError(f"decode_workers must be at least 1, got {decode_workers}")
        self.capacity = decode_workers + 1
        self._load, self._settings, self._roundtrip = load, settings, roundtrip
        self._lock, self._closed = RLock(), False
        self._decoders, self._thread = Threads(decode_workers, "decode"), Threads(1, "teacher")
        self._wait = min(wait, TIMEOUT_MAX)
        #: not decoded yet; and how many are being decoded or wait decoded for the teacher
        self._waiting: deque[_Job] = deque()
        self._ahead = 0
        #: of requests without an answer
        self._open: set[Future[Made]] = set()
        self._reader: Reader | None = None
        self._patience = Patience()
        self._dead: DeadTeacher | None = None
        self._stuck = False

    def ready(self) -> Teacher | Source:
        """Load the teacher if needed. Nothing else may use it while a request is open.

        Raises:
            DeadTeacher: the teacher cannot be loaded.
        """
        with self._lock:
            if self._dead is not None:
                raise self._dead
            if self._reader is None:
                try:
                    self._reader = Reader(self._load(), self._settings, self._roundtrip)
                except Exception as error:
                    self._dead = DeadTeacher(reason_of(error))
                    raise self._dead from error
                if not self._closed:
                    self._thread.submit(self._enter, torch.get_num_threads())
            return self._reader.teacher

    def submit(self, request: PriorRequest) -> Future[Made]:
        job = _Job(request)
        with self._lock:
            if self._closed:
                raise RuntimeError("the maker of priors is closed")
            self.ready()
            self._waiting.append(job)
            self._decode_ahead()
            answer = self._thread.submit(self._answer, job)
            self._open.add(answer)
            answer.add_done_callback(lambda done: self._settled(job, done))
        return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._thread.close(wait=not self._stuck)
        self._decoders.close(wait=not self._stuck)

    def _enter(self, threads: int) -> None:
        assert self._reader is not None
        try:
            # A new thread splits arithmetic into another number of threads than its caller, and sums may
            # then round differently.
            torch.set_num_threads(threads)
            _use_own_stream(self._reader.teacher.device)
        except Exception as error:
            self._dead = DeadTeacher(f"the teacher's thread has ended: {reason_of(error)}")

    def _answer(self, job: _Job) -> Made:
        if self._closed:
            raise CancelledError
        if self._dead is not None:
            raise self._dead
        assert self._reader is not None
        assert job.video is not None
        late = Timer(self._wait, self._late, [job.request])
        late.daemon = True
        late.start()
        try:
            # No name is bound to the frames: they must be freed when the next clip is decoded.
            made = self._reader.read(job.request, job.video.result())
        except Exception as error:
            judged = self._patience.judge(error)
            if isinstance(judged, DeadTeacher):
                # Requests that wait are not tried, and get the same reason.
                self._dead = judged
            raise judged from judged.__cause__
        finally:
            late.cancel()
        self._patience.failures = 0
        return made

    def _late(self, request: PriorRequest) -> None:
        """Answer all requests with the error of a dead teacher: its thread is stuck in this request."""
        said = f"the teacher gave no prior of {request.video} for {self._wait:g} s (--prior_wait)"
        with self._lock:
            self._dead, self._stuck = DeadTeacher(said), True
            unanswered = [*self._open]
        for answer in unanswered:
            with contextlib.suppress(InvalidStateError):
                answer.set_exception(self._dead)

    def _settled(self, job: _Job, answer: Future[Made]) -> None:
        """Drop a job that was answered or cancelled, and decode the next one."""
        with self._lock:
            self._open.discard(answer)
            if job.video is None:
                self._waiting.remove(job)
            else:
                job.video.cancel()
                job.video = None
                self._ahead -= 1
            self._decode_ahead()

    def _decode_ahead(self) -> None:
        assert self._reader is not None
        while self._waiting and self._ahead < self.capacity and not self._closed:
            job = self._waiting.popleft()
            job.video = self._decoders.submit(self._reader.decode, job.request)
            self._ahead += 1


@dataclass(eq=False)
class _Job:
    request: PriorRequest
    video: Future[Video] | None = None


def reason_of(error: BaseException) -> str:
    """Return an error as one line of text, with its type if the message alone says little."""
    said = " ".join(str(error).split())
    return said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


def _use_own_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
        # The weights were copied there on the stream that loaded them.
        stream.wait_stream(torch.cuda.default_stream(device))
        torch.cuda.set_stream(stream)


class Stored:
    """Looks in a store first; missing priors are made and written to the store.

    A damaged file is set aside and its prior is made again. If a clip and text can give no prior, this is
    recorded, and they are not tried again. A fault of the machine is never recorded. Concurrent requests with
    the same key share one attempt; only the first of them gets `Made.fresh` and `Made.seconds`.

    Args:
        store: store of the priors.
        maker: makes missing priors; `close` closes it.
        name: `prior_keys` of the teacher and its settings.
        teacher: path of the teacher, for `MotionPrior.origin`.
        retry: whether to try recorded refusals of earlier runs once more.
        strict: if the store cannot be written, every request fails. Otherwise the prior is used, and
            `Made.lost` says why it is not kept.
    """

    def __init__(
        self,
        store: PriorStore,
        maker: PriorMaker,
        name: Callable[[str, str], str],
        teacher: str = "",
        *,
        strict: bool = False,
        retry: bool = False,
    ) -> None:
        self.store, self.maker, self.strict = store, maker, strict
        self._retried_before = time() if retry else 0.0
        # Several threads: while some wait for the maker, others read stored priors.
        self.capacity = maker.capacity + 2
        self._name, self._teacher, self._lock, self._closed = name, teacher, RLock(), False
        self._pool = ThreadPoolExecutor(self.capacity, thread_name_prefix="store")
        self._open: dict[str, Future[Made]] = {}

    def submit(self, request: PriorRequest) -> Future[Made]:
        """See `PriorMaker`. A request with a recorded refusal gets `RefusedClip`."""
        if not request.key or request.settings is not None:
            return self.maker.submit(request)
        with self._lock:
            if self._closed:
                raise RuntimeError("the maker of priors is closed")
            first = self._open.get(request.key)
            if first is None or first.done():
                answer = self._open[request.key] = self._pool.submit(self._find_or_make, request)
                answer.add_done_callback(lambda done: self._forget(request.key, done))
                return answer
        # If requests share an attempt, only the first one reports its time and a damaged file.
        return when_all([first], lambda: replace(first.result(), fresh=False, seconds=0.0, damaged=""))

    def _forget(self, key: str, done: Future[Made]) -> None:
        with self._lock:
            if self._open.get(key) is done:
                del self._open[key]

    def close(self) -> None:
        # Do not wait for the pool with the lock held: a cancelled job takes the lock to be forgotten.
        with self._lock:
            self._closed = True
        # Cancel first: a thread that has not begun must not make what the maker cancels.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.maker.close()
        self._pool.shutdown()

    def _find_or_make(self, request: PriorRequest) -> Made:
        found, damaged = self.look(request.key)
        if found is not None:
            return Made(found, fresh=False)
        try:
            made = self.maker.submit(request).result()
        except (VideoError, PriorError) as error:
            self._put_on_record(request, error)
            raise
        lost = ""
        try:
            origin = f"{Path(str(request.video)).name} by {Path(self._teacher).name}"
            made = replace(made, prior=replace(made.prior, clip=self._check_clip(request), origin=origin))
            self.store.write(request.key, made.prior)
        except VideoError as error:
            if self.strict:
                raise
            lost = f"priors used, but not kept: the clip {error.reason}"
        except OSError as error:
            if self.strict:
                raise DeadTeacher(
                    f"the store {self.store.folder} cannot be written ({error.strerror})"
                ) from error
            lost = f"priors used, but not kept: the store cannot be written ({error.strerror})"
        return replace(made, damaged=damaged, lost=lost)

    def look(self, key: str) -> tuple[MotionPrior | None, str]:
        """Return a stored prior or None, and the fault of a damaged file, which is set aside.

        Raises:
            RefusedClip: the store has a record that there can be no prior.
        """
        try:
            return self.store.read(key), ""
        except KeyError:
            pass
        except DamagedPrior as error:
            # A file that cannot be renamed cannot be replaced either; the store's error says so later.
            with contextlib.suppress(OSError):
                self.store.set_aside(key)
            return None, str(error)
        refusal = self.store.refusal(key)
        where = self.store.refusal_path(key)
        if refusal is not None and where.stat().st_mtime >= self._retried_before:
            raise RefusedClip(
                replace(refusal, detail=f"{refusal.detail} (on record, not tried again: {where})")
            )
        return None, ""

    def _check_clip(self, request: PriorRequest) -> str:
        """Return the clip's part of its key; `VideoError` if the clip changed since the key was made."""
        digest = content_digest(request.video)
        if request_key(self._name, digest, request) != request.key:
            raise VideoError(Path(request.video), "changed during the run; start again")
        return clip_name(digest, request)

    def _put_on_record(self, request: PriorRequest, error: VideoError | PriorError) -> None:
        # Without a record the clip is only tried again, so an unwritable store does not stop the run.
        with contextlib.suppress(VideoError, OSError):
            refusal = refusal_of(error)
            if not refusal.passing:
                self._check_clip(request)
                self.store.refuse(request.key, refusal)


def when_all(waiting: Sequence[Future[Made]], combine: Callable[[], Made]) -> Future[Made]:
    """Return a future of `combine()`, called after all futures are done; to cancel it cancels no other."""
    answer: Future[Made] = Future()
    left, lock = [len(waiting)], Lock()

    def settled(_: Future[Made]) -> None:
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if not last or not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(combine())
        except (Exception, CancelledError) as error:
            answer.set_exception(error)

    for one in waiting:
        one.add_done_callback(settled)
    return answer


def refusal_of(error: VideoError | PriorError | RefusedClip) -> Refusal:
    """Return the record of why a request has no prior."""
    if isinstance(error, RefusedClip):
        return error.refusal
    if isinstance(error, VideoError):
        reason = getattr(error, "refusal", "unreadable video")
        return Refusal(reason, str(error), unreadable=True, passing=error.passing)
    return Refusal("no prior: the teacher cannot read it", str(error))


def count_made(sample: Sample, made: Made, skips: SkipLog) -> None:
    """Note unusual facts about a used prior, and count the parts that were left out of it."""
    for reason, detail in made.left_out:
        skips.add(reason, id=sample.id, line=sample.line, detail=detail)
    if made.damaged:
        skips.note("damaged priors made anew")
    if made.lost:
        skips.note(made.lost)
    if made.prior.unknown:
        skips.note(PARTLY_UNKNOWN, id=sample.id)


def count_failed(sample: Sample, error: Exception, skips: SkipLog) -> None:
    """Count a sample without a prior, under the clip's own reason if there is one."""
    reason, detail = "no prior: the teacher failed on it", f"{type(error).__name__}: {error}"
    if isinstance(error, VideoError | PriorError | RefusedClip):
        refusal = refusal_of(error)
        reason, detail = refusal.reason, refusal.detail
    skips.add(reason, id=sample.id, line=sample.line, detail=detail)


def make_all(
    requests: Iterable[tuple[Item, PriorRequest]], maker: PriorMaker
) -> Iterator[tuple[Item, PriorRequest, Made | Exception]]:
    """Submit a bounded number of requests ahead, and yield their results in order.

    Args:
        requests: pairs of any item and its request; read only as far ahead as needed.
        maker: the maker; it is not closed here.

    Yields:
        The item, its request, and the prior or the error.

    Raises:
        DeadTeacher: no more priors can be made.
    """
    waiting: deque[tuple[Item, PriorRequest, Future[Made]]] = deque()

    def settle() -> tuple[Item, PriorRequest, Made | Exception]:
        item, request, answer = waiting.popleft()
        try:
            return item, request, answer.result()
        except DeadTeacher:
            raise
        except (Exception, CancelledError) as error:
            return item, request, error

    try:
        for item, request in requests:
            waiting.append((item, request, maker.submit(request)))
            if len(waiting) > 2 * maker.capacity:
                yield settle()
        while waiting:
            yield settle()
    finally:
        for _, _, answer in waiting:
            answer.cancel()
