"""Where teachers run: in this process, or in actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from accelerate import PartialState

from ..teachers import Teacher
from .maker import LocalMaker, PriorMaker
from .prior import PriorSettings

__all__ = ["ENGINES", "Engine", "LocalEngine", "open_engine"]

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Hires teachers.

    Attributes:
        device: what a teacher runs on.
        teachers: how many there are for this process.
    """

    device: torch.device
    teachers: int

    def maker(
        self,
        load: Callable[[torch.device | str], Teacher],
        teacher_id: str,
        settings: PriorSettings,
        *,
        roundtrip: bool = False,
    ) -> PriorMaker:
        """Return a maker of priors, to be closed by the caller.

        Args:
            load: returns the teacher on a device. Ray pickles it, so its paths must be absolute.
            teacher_id: of the teacher that this process sees.
            settings: of the priors.
            roundtrip: also measure the inversion error of a first clip.
        """
        ...


@dataclass
class LocalEngine:
    """A teacher in a thread of this process, clips decoded ahead in `decode_workers` threads."""

    device: torch.device
    decode_workers: int = 2
    teachers: int = 1

    def maker(
        self,
        load: Callable[[torch.device | str], Teacher],
        teacher_id: str,
        settings: PriorSettings,
        *,
        roundtrip: bool = False,
    ) -> LocalMaker:
        """See `Engine`."""
        return LocalMaker(
            partial(load, self.device), settings, decode_workers=self.decode_workers, roundtrip=roundtrip
        )


@contextmanager
def open_engine(
    name: str,
    *,
    decode_workers: int = 2,
    address: str | None = None,
    actors: int | None = None,
    cpus: int | None = None,
) -> Iterator[Engine]:
    """Open an engine for as long as the context lasts.

    Args:
        name: "local" or "ray".
        decode_workers: threads that decode clips ahead of a local teacher.
        address: of the Ray cluster; None takes `RAY_ADDRESS`, then one that runs on this machine, then a new
            one. Several processes join one cluster and share its GPUs.
        actors: teachers of this process; None is this process's share of the cluster's GPUs, at least one.
        cpus: cores that each actor reserves and computes with; None is 1.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
    """
    state = PartialState()
    if name == "local":
        yield LocalEngine(state.device, decode_workers)
        return
    try:
        from .ray_maker import open_cluster
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ValueError('--prior_engine ray needs Ray: pip install "motionenhancer[ray]"') from error
    if state.num_processes > 1:
        # Each process would start a cluster of its own on the same GPUs.
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
    with open_cluster(address, actors, cpus or 1, state.num_processes) as engine:
        yield engine
