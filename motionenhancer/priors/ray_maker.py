"""Teachers on the GPUs of a Ray cluster: each in its own actor, which takes one request at a time.

Ray Data is not used: it would retry a clip that kills its worker again and again, and its errors name blocks
of rows. Here such a clip is found, recorded and left out. Importing this module needs Ray.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition, Thread
from time import monotonic
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayError, RayTaskError

from ..data.video import VideoError, content_digest
from ..teachers import Teacher
from .maker import WAIT, DeadTeacher, Patience, reason_of
from .prior_settings import PriorSettings
from .reader import Reader, Source
from .requests import Made, PriorRequest

TRIES = 2
"""Number of attempts with a clip that kills its actor, before the clip is left out."""

DEATHS = 12
"""The run stops after this many consecutive deaths of actors without a finished prior."""

SLOW = 60
"""Seconds after which an actor that has not started causes a warning."""

SAME_FILES = "with Ray all nodes need the same files at the same paths"

TOKEN = (
    "copy ~/.ray/auth_token of the cluster's head node to the same place here, or put the token into "
    "RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token in every process that joins"
)

logger = logging.getLogger("motionenhancer")


class UnseenFile(RuntimeError):
    """A node does not see a file that exists on the driver."""


class KillerClip(VideoError):
    """A clip that kills the process that reads it."""

    refusal = "no prior: its clip kills the worker"


@dataclass
class _Actor:
    """A teacher on its own GPU."""

    load: Callable[[torch.device | str], Teacher | Source]
    teacher_id: str
    settings: PriorSettings
    device: torch.device
    roundtrip: bool

    def open(self) -> None:
        """Load the teacher. Raise `DeadTeacher` if this node cannot load it or has a different teacher."""
        node = ray.util.get_node_ip_address()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DeadTeacher(f"an actor on node {node} has no GPU that it can use")
        try:
            teacher = self.load(self.device)
        except Exception as error:
            # Not chained: a library's error may not survive pickling on its way to the driver.
            raise DeadTeacher(
                f"an actor on node {node} cannot load the teacher: {reason_of(error)}; {SAME_FILES}"
            ) from None
        if teacher.id != self.teacher_id:
            raise DeadTeacher(f"an actor on node {node} sees another teacher at the same path; {SAME_FILES}")
        self.reader = Reader(teacher, self.settings, self.roundtrip)

    def make(self, request: PriorRequest) -> Made:
        """Make a prior; errors as in `PriorMaker.submit`."""
        if not Path(request.video).exists():
            raise UnseenFile(ray.util.get_node_ip_address())
        return self.reader.read(request, self.reader.decode(request))


@dataclass
class _Job:
    request: PriorRequest
    answer: Future[Made]
    deaths: int = 0


@dataclass(frozen=True)
class Cluster:
    """A process's share of a Ray cluster: teachers, and the cores and share of a GPU that each reserves.

    `wait` is in seconds; see `RayMaker`.
    """

    device: torch.device
    teachers: int
    cpus: int
    share: float
    wait: float = WAIT


class RayMaker:
    """Actors on any GPUs of any nodes of a Ray cluster; see `PriorMaker`.

    Only an actor with a loaded teacher gets requests. So no request waits for an actor that has no place in
    the cluster while other actors work, and a death during loading is not blamed on a clip. If an actor dies,
    its clip is tried once more on a new actor and then refused (`KillerClip`).

    Every wait has a limit: the teacher counts as dead if for `cluster.wait` seconds no actor has a teacher,
    or an actor does not answer a request.

    Args:
        cluster: the share of the cluster for the actors.
        load: returns the teacher on a device; pickled into every actor.
        teacher_id: id of the teacher that the driver sees.
        settings, roundtrip: see `Reader`.

    Attributes:
        deaths: actors that died so far.
    """

    def __init__(
        self,
        cluster: Cluster,
        load: Callable[[torch.device | str], Teacher | Source],
        teacher_id: str,
        settings: PriorSettings,
        *,
        roundtrip: bool = False,
    ) -> None:
        self.capacity = cluster.teachers
        self.deaths = 0
        self._in_a_row, self._patience = 0, Patience()
        self._dead: DeadTeacher | None = None
        self._arguments = (load, teacher_id, settings, cluster.device, roundtrip)
        self._options = {
            "num_cpus": cluster.cpus,
            "num_gpus": cluster.share,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        self._jobs: deque[_Job] = deque()
        self._closing = False
        #: number of actors with a teacher, and since when there is none
        self._teachers, self._alone_since = 0, monotonic()
        self._wait = cluster.wait
        #: Guards the mutable state above, and notifies when a job arrives or the maker is closed.
        self._changed = Condition()
        self._hands = [Thread(target=self._serve, daemon=True) for _ in range(self.capacity)]
        for hand in self._hands:
            hand.start()

    def submit(self, request: PriorRequest) -> Future[Made]:
        answer: Future[Made] = Future()
        # Actors start in folders of their own.
        request = replace(request, video=request.video.absolute())
        with self._changed:
            if self._closing:
                raise RuntimeError("the maker of priors is closed")
            self._jobs.append(_Job(request, answer))
            self._changed.notify()
        return answer

    def close(self) -> None:
        with self._changed:
            self._closing = True
            given_up = [*self._jobs]
            self._jobs.clear()
            self._changed.notify_all()
        # Before the wait, which a second Ctrl-C may end: callers must not wait for an answer forever.
        for job in given_up:
            _give_up(job)
        for hand in self._hands:
            hand.join()

    def _serve(self) -> None:
        """Give jobs to one actor, one at a time; start a new actor if it died."""
        actor = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if self._closing:
                    break
                job = None if actor is None and self._dead is None else self._jobs.popleft()
            if job is None:
                actor = self._hire()
                if actor is not None:
                    self._count_teachers(1)
            elif not self._answer(actor, job):
                actor = None
                self._count_teachers(-1)
        _dismiss(actor)

    def _count_teachers(self, change: int) -> None:
        with self._changed:
            self._teachers += change
            self._alone_since = monotonic()

    def _needs(self) -> str:
        """The resources that an actor needs, and those that the cluster has."""
        held = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        return f"it needs {self._options['num_cpus']} cores and {self._options['num_gpus']} GPUs of {held}"

    def _hire(self) -> Any:
        """Return a new actor with its teacher; None if it died or the maker was closed meanwhile."""
        actor: Any = None
        waited = 0
        try:
            # A new actor, not a restart of the dead one: Ray may place it on another node.
            actor = ray.remote(_Actor).options(**self._options).remote(*self._arguments)
            opening = actor.open.remote()
            while not ray.wait([opening], timeout=1)[0]:
                if self._closing or self._dead is not None:
                    _dismiss(actor)
                    return None
                waited += 1
                if waited == SLOW:
                    logger.warning("a Ray actor has not started for %d s: %s", waited, self._needs())
                if self._teachers == 0 and monotonic() - self._alone_since > self._wait:
                    raise DeadTeacher(
                        f"no Ray actor has a teacher after {self._wait:g} s (--prior_wait): {self._needs()}"
                    )
            ray.get(opening)
            return actor
        except RayTaskError as error:
            self._end(error.cause)
        except RayError as error:
            self._count_death(error)
        except Exception as error:
            self._end(error)
        _dismiss(actor)
        return None

    def _answer(self, actor: Any, job: _Job) -> bool:
        """Let the actor do a job; return whether the actor is still alive."""
        if not (job.answer.running() or job.answer.set_running_or_notify_cancel()):
            return True
        try:
            if self._dead is not None:
                raise self._dead
            made = ray.get(actor.make.remote(job.request), timeout=self._wait)
        except RayTaskError as error:
            self._failed(job, error.cause)
        except GetTimeoutError:
            _dismiss(actor)
            late = f"a Ray actor gave no prior of {job.request.video} for {self._wait:g} s (--prior_wait)"
            self._end(DeadTeacher(late))
            job.answer.set_exception(self._dead)
            return False
        except RayError as error:
            _dismiss(actor)
            self._count_death(error)
            job.deaths += 1
            with self._changed:
                again = job.deaths < TRIES and not self._closing
                if again:
                    self._jobs.appendleft(job)
                    self._changed.notify()
            if job.deaths >= TRIES:
                said, passing = f"{TRIES} actors died while they read this clip", is_machines(error)
                killer = KillerClip(Path(job.request.video), said, passing=passing)
                job.answer.set_exception(self._dead or killer)
            elif not again:
                _give_up(job)
            return False
        except Exception as error:
            self._failed(job, error)
        else:
            with self._changed:
                self._in_a_row = self._patience.failures = 0
            job.answer.set_result(made)
        return True

    def _count_death(self, error: RayError) -> None:
        with self._changed:
            self.deaths += 1
            self._in_a_row += 1
            if self._in_a_row >= DEATHS:
                self._dead = DeadTeacher(
                    f"{DEATHS} actors died one after another, the last of: {reason_of(error)}"
                )

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._dead = error if isinstance(error, DeadTeacher) else DeadTeacher(reason_of(error))

    def _failed(self, job: _Job, error: Exception) -> None:
        """Answer with an error; mark the teacher as dead if the error says so."""
        if isinstance(error, UnseenFile):
            try:
                content_digest(job.request.video)
            except VideoError as unread:
                error = unread
            else:
                video = job.request.video
                error = DeadTeacher(
                    f"node {error} does not see {video}, which is there on this node; {SAME_FILES}"
                )
        with self._changed:
            self._in_a_row = 0
            judged = self._patience.judge(error)
            if isinstance(judged, DeadTeacher):
                self._dead = judged
        job.answer.set_exception(judged)


def is_machines(error: RayError) -> bool:
    """Whether Ray blames an actor's death on the machine: its node is gone, or Ray ended it to free memory.

    >>> is_machines(RayError("The actor died because its node has died. Node Id: 1"))
    True
    """
    said = ("its node has died", "low on memory")
    return isinstance(error, NodeDiedError | OutOfMemoryError) or any(part in str(error) for part in said)


def _give_up(job: _Job) -> None:
    if not job.answer.cancel():
        # Its actor died after it began.
        job.answer.set_exception(CancelledError())


def _dismiss(actor: Any) -> None:
    if actor is not None:
        with suppress(RayError):
            ray.kill(actor)


@contextmanager
def open_cluster(
    address: str | None, actors: int | None, cpus: int, processes: int, wait: float = WAIT
) -> Iterator[Cluster]:
    """Join a Ray cluster, or start one on this machine that ends with the context.

    Args:
        address: of the cluster. None: `RAY_ADDRESS`, else a cluster on this machine, else a new one.
        actors: number of teachers of this process; None: its share of the cluster's GPUs, at least one.
        cpus: number of cores that each actor reserves and uses.
        processes: number of processes that share the cluster.
        wait: see `RayMaker`.

    Raises:
        ValueError: there is no cluster at the address, it asks for a token, or none can be started.
    """
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            # Ray raises a bare Exception where a node does not start in time.
            where = "no cluster could be started here" if address is None else f"--ray_address {address}"
            if any("authentication token" in str(each).lower() for each in (error, error.__cause__)):
                raise ValueError(f"--prior_engine ray: {where} asks for a token; {TOKEN}") from error
            raise ValueError(f"--prior_engine ray: {where} ({error})") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        mine = actors or max(1, gpus // processes)
        device = torch.device("cuda" if gpus else "cpu")
        yield Cluster(device, mine, cpus, gpu_share(gpus, mine * processes), wait)
    finally:
        if not joined:
            ray.shutdown()


def gpu_share(gpus: int, actors: int) -> float:
    """Return the share of a GPU that each actor reserves, so that all actors of all processes fit.

    >>> gpu_share(2, 3)  # as two on one GPU: an actor does not spread over two
    0.5
    """
    return 1 / math.ceil(actors / gpus) if gpus else 0.0
