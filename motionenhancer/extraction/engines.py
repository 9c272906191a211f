"""Who does the work of an extraction: the processes of a launcher here, or the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..processes import from_main
from .job import Job, Looked, Result
from .workload import Share, Workload

#: Keys without a prior whose details are kept.
KEPT = 10_000


@dataclass
class Done:
    """What came of a workload.

    Attributes:
        stored: priors that were in the store, read and found good.
        made: priors made.
        damaged: stored files that were damaged, set aside, and made anew or tried to.
        unknown: priors, stored or made, some of whose text the teacher's tokenizer has no piece for.
        refused: keys without a prior, and why.
        roundtrip: inversion error of the first clip made, if it was asked for.
        deaths: workers that died and were replaced.
        made_each: priors that each process made; empty where work is not dealt beforehand.
    """

    stored: int = 0
    made: int = 0
    damaged: int = 0
    unknown: int = 0
    refused: list[Result] = field(default_factory=list)
    roundtrip: dict[str, float] | None = None
    deaths: int = 0
    made_each: list[int] = field(default_factory=list)

    def look(self, looked: Looked) -> None:
        """Count what the store holds of a key."""
        self.stored += looked.good
        self.unknown += looked.unknown
        if looked.damage:
            self.damaged += 1
            tqdm.write(f"damaged prior set aside, making it anew: {looked.damage}")

    def add(self, result: Result) -> None:
        """Count what came of a missing key."""
        if not result.reason:
            self.made += 1
            self.unknown += result.unknown
            self.roundtrip = self.roundtrip or result.roundtrip
        else:
            self.refused.append(result if len(self.refused) < KEPT else result._replace(detail=""))

    def join(self, other: Done) -> None:
        """Count what another process did."""
        for name in ("stored", "made", "damaged", "unknown", "refused", "deaths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.roundtrip = self.roundtrip or other.roundtrip


class Engine(Protocol):
    """Does the work. `device` is what teachers run on, `workers` how many there are."""

    @property
    def device(self) -> torch.device: ...

    @property
    def workers(self) -> int: ...

    def run(self, job: Job, work: Workload) -> Done:
        """Check what is stored and make what is missing.

        Args:
            job: of the extraction.
            work: all of it, in the main process; the others' is not looked at.
        """
        ...


@dataclass
class LocalEngine:
    """This process, and the others of `accelerate launch` or `torchrun`."""

    state: PartialState

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def workers(self) -> int:
        return self.state.num_processes

    def run(self, job: Job, work: Workload) -> Done:
        main, count = self.state.is_main_process, self.state.num_processes
        done, lost = Done(), []
        parts = [work.take(part) for part in np.array_split(work.stored(), count)] if main else []
        share = self._mine(parts)
        with stored_bar(len(share), main) as bar:
            for looked in job.check(share):
                done.look(looked)
                if not looked.good:
                    lost.append(looked.number)
                bar.update()
        work.lost(index for index in gather_object(lost) if main)
        share = self._mine(work.deal(work.missing(), count) if main else [])
        if len(share):
            teacher = job.load(self.device)
            with priors_bar(done.stored, len(share), main) as bar:
                for result in job.make(share, teacher):
                    done.add(result)
                    if result.reason:
                        bar.set_postfix({"left out": len(done.refused)}, refresh=False)
                    bar.update()
        everyone = Done()
        for part in gather_object([done]):
            everyone.join(part)
            everyone.made_each.append(part.made)
        return everyone

    def _mine(self, shares: list[Share]) -> Share:
        """The main process decides for all: they could find different priors in the store."""
        return from_main(shares)[self.state.process_index]


def stored_bar(total: int, show: bool) -> tqdm:
    """The bar of the stored priors that are checked."""
    return tqdm(desc="stored", unit="prior", total=total, disable=not show, leave=False)


def priors_bar(stored: int, missing: int, show: bool) -> tqdm:
    """The bar of the priors that are made, with rate and time left."""
    return tqdm(desc="priors", unit="prior", total=stored + missing, initial=stored, disable=not show)


@contextmanager
def open_engine(
    name: str, state: PartialState, address: str | None, workers: int | None, cpus: int
) -> Iterator[Engine]:
    """The engine of a run, for as long as it lasts.

    Args:
        name: "local" or "ray".
        state: of the processes.
        address, workers, cpus: of the Ray cluster; see `motionenhancer.extraction.ray_engine`.

    Raises:
        ValueError: Ray is not installed, its cluster is not there, or several processes were launched for it.
    """
    if name == "local":
        yield LocalEngine(state)
        return
    if state.num_processes > 1:
        raise ValueError(
            "--engine ray starts workers of its own (--ray_workers): start one process, "
            f"got {state.num_processes}"
        )
    try:
        from .ray_engine import ray_engine
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ValueError('--engine ray needs Ray: pip install "motionenhancer[ray]"') from error
    with ray_engine(address, workers, cpus) as engine:
        yield engine
