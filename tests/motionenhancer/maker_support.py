"""What the tests of makers share: a teacher that does what a clip says."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from test_store import made_for

from motionenhancer.data import content_digest
from motionenhancer.data.video import VideoError
from motionenhancer.priors.maker import (
    LocalMaker,
    Made,
    Stored,
)
from motionenhancer.priors.prior import MotionPrior, PriorError
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import PriorRequest
from motionenhancer.priors.storage import PriorStore, prior_keys

SETTINGS = PriorSettings(steps=1)

NAME = prior_keys("t", SETTINGS)

SECONDS = 20

MACHINE_FAULTS = {
    "memory": MemoryError("cannot allocate"),
    "cuda": RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"
    ),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "full": VideoError("clip", "cannot be read (Too many open files)", passing=True),
}


@dataclass
class Fake:
    """A teacher that reads files of text: what such a clip says is what comes of it.

    Attributes:
        folder: of the clips.
        read: clips that the teacher was given, by what they say.
        decoded: clips that were decoded.
        gates: a clip of this content waits for its event.
        alive: decoded clips that are still in memory; `most` is the most there were.
    """

    folder: Path
    read: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    begun: dict[str, threading.Event] = field(default_factory=dict)
    loads: int = 0
    alive: int = 0
    most: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_frames: int = 17
    size: tuple[int, int] = (16, 24)
    id: str = "t"
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> Fake:
        self.loads += 1
        return self

    def request(self, says: str, text: str = "it moves", name: str = "", **options: object) -> PriorRequest:
        clip = self.folder / f"{name or says}.mp4"
        clip.write_text(says)
        return PriorRequest(clip, text, NAME(content_digest(clip), text), **options)  # type: ignore[arg-type]

    def requests(self, *says: str) -> list[PriorRequest]:
        return [self.request(one) for one in says]

    def read_frames(
        self, path: Path, *, num_frames: int, min_frames: int, size: tuple[int, int]
    ) -> SimpleNamespace:
        assert (num_frames, min_frames, size) == (self.max_frames, 2, self.size)
        says = path.read_text()
        if says.startswith("broken"):
            raise VideoError(path, "is no video")
        if says.startswith("full"):
            raise MACHINE_FAULTS["full"]
        frames = np.frombuffer(says.encode(), np.uint8).copy()
        weakref.finalize(frames, self._gone)
        with self._lock:
            self.decoded.append(says)
            self.alive += 1
            self.most = max(self.most, self.alive)
        return SimpleNamespace(frames=frames, timestamps=[0.0])

    def _gone(self) -> None:
        with self._lock:
            self.alive -= 1

    def extract_prior(
        self, teacher: Fake, frames: np.ndarray, text: str, *, times: list[float], **settings: object
    ) -> MotionPrior:
        assert times == [0.0]
        assert teacher is self
        says = frames.tobytes().decode()
        self.read.append(says)
        if says in self.gates:
            self.begun[says].set()
            assert self.gates[says].wait(SECONDS)
        if says.startswith("blank"):
            raise PriorError("it has no word")
        fault = MACHINE_FAULTS.get(says.partition(" ")[0])
        if fault is not None:
            raise fault
        return made_for(text, PriorSettings(**settings), seed=sum(frames.tolist()))  # type: ignore[arg-type]

    def hold(self, says: str) -> Callable[[], None]:
        """Let a clip wait; returns what lets it go on."""
        self.gates[says], self.begun[says] = threading.Event(), threading.Event()
        return self.gates[says].set


def local(fake: Fake, **options: object) -> closing[LocalMaker]:
    return closing(LocalMaker(fake.load, SETTINGS, **options))  # type: ignore[arg-type]


def kept(fake: Fake, store: PriorStore, **options: object) -> closing[Stored]:
    return closing(Stored(store, LocalMaker(fake.load, SETTINGS), NAME, **options))  # type: ignore[arg-type]


def answer(future: Future[Made]) -> Made | BaseException:
    try:
        return future.result(SECONDS)
    except (Exception, CancelledError) as error:
        return error


def files(store: PriorStore) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.folder.rglob("*")) if p.is_file()}
