"""One extraction as its processes and workers do it: what is read, what is written, what came of each key."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..arguments import PriorArguments
from ..data.readers import sample_at
from ..prior import MotionPrior
from ..store import DamagedPrior, PriorStore
from ..vdm import Teacher
from .making import ahead, make_each, refusal_of, stored
from .planning import PriorRequest
from .workload import Share, read_requests


class Looked(NamedTuple):
    """What the store holds of a key of the workload: whether it is good, and what is wrong if not.

    unknown: the teacher's tokenizer has no piece for some of its text.
    """

    number: int
    good: bool
    damage: str = ""
    unknown: bool = False


class Result(NamedTuple):
    """What came of a missing key of the workload: why there is no prior, if there is none.

    unknown: as of `Looked`.
    """

    number: int
    reason: str = ""
    detail: str = ""
    roundtrip: dict[str, float] | None = None
    unknown: bool = False


@dataclass(frozen=True)
class Job:
    """An extraction.

    Attributes:
        data: the data file.
        video_root: folder of its videos; None is the data file's own.
        prior: which teacher, how, and where priors are kept.
        decode_workers: threads a process that decode ahead of the teacher.
    """

    data: Path
    video_root: Path | None
    prior: PriorArguments
    decode_workers: int

    @property
    def store(self) -> PriorStore:
        return PriorStore(Path(self.prior.prior_dir))

    def requests(self, share: Share) -> Iterator[PriorRequest]:
        """The requests of a share, read from the data file as they are asked for."""
        return read_requests(share.items, self.data, self.video_root, self.prior.prompt_source)

    def places(self, items: np.ndarray) -> Iterator[tuple[str, int]]:
        """Id and line of some samples; no id where the data file has changed."""
        with self.data.open("rb") as file:
            for item in items:
                offset, line = int(item["offset"]), int(item["line"])
                try:
                    yield sample_at(file, offset, line, self.data.parent).id, line
                except ValueError:
                    yield "", line

    def check(self, share: Share) -> Iterator[Looked]:
        """Read and check the stored priors of a share; damaged ones are set aside."""
        store, keys = self.store, zip(share.indices, share.keys(), strict=True)
        with ThreadPoolExecutor(self.decode_workers) as pool:
            for (index, _), reading in ahead(pool, lambda k: stored(store, k[1]), keys, self.decode_workers):
                found = reading.result()
                damage = str(found) if isinstance(found, DamagedPrior) else ""
                good = isinstance(found, MotionPrior)
                yield Looked(int(index), good, damage, isinstance(found, MotionPrior) and found.unknown > 0)

    def load(self, device: torch.device | str) -> Teacher:
        """The teacher."""
        return self.prior.load(device)

    def make(self, share: Share, teacher: Teacher) -> Iterator[Result]:
        """Make the priors of a share and store them, one after another."""
        settings = self.prior.settings()
        each = make_each(
            self.requests(share), self.store, settings, teacher, decode_workers=self.decode_workers
        )
        measured = not self.prior.measure_roundtrip
        for index, one in zip(share.indices, each, strict=True):
            if not isinstance(one.result, MotionPrior):
                why = refusal_of(one.result)
                yield Result(int(index), why.reason, why.detail)
                continue
            found = None if measured else one.roundtrip(teacher, settings.steps)
            measured = True
            yield Result(int(index), roundtrip=found, unknown=one.result.unknown > 0)
