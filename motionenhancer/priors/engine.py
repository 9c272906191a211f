"""Where teachers run: in this process, or in actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import PartialState

from ..teachers import Teacher
from .maker import WAIT, LocalMaker, PriorMaker
from .prior_settings import PriorSettings
from .reader import Source

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """Starts teachers.

    Attributes:
        device: device of a teacher.
        teachers: number of teachers for this process.
        maker: `maker(load, teacher_id, settings, roundtrip=False)` returns a maker, to be closed by the
            caller.
            `load` returns the teacher on a device; Ray pickles it, so its paths must be absolute.
            `teacher_id`
            is that of the teacher that this process sees.
    """

    device: torch.device
    teachers: int
    maker: Callable[..., PriorMaker]


@contextmanager
def open_engine(
    name: str,
    *,
    decode_workers: int = 2,
    address: str | None = None,
    actors: int | None = None,
    cpus: int | None = None,
    wait: float | None = None,
) -> Iterator[Engine]:
    """Open an engine for the time of the context.

    Args:
        name: "local" or "ray".
        decode_workers: threads that decode clips ahead of a local teacher.
        address: address of the Ray cluster. None: `RAY_ADDRESS`, else a cluster on this machine, else a new
            one. Several processes join one cluster and share its GPUs.
        actors: number of teachers of this process; None: its share of the cluster's GPUs, at least one.
        cpus: number of cores that each actor reserves and uses; None: 1.
        wait: seconds for one prior, or in a cluster without any teacher, after which the run stops; None: an
            hour.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
    """
    state = PartialState()

    def local(
        load: Callable[[torch.device], Teacher | Source],
        teacher_id: str,
        settings: PriorSettings,
        roundtrip: bool = False,
    ) -> LocalMaker:
        loads = partial(load, state.device)
        return LocalMaker(
            loads, settings, decode_workers=decode_workers, roundtrip=roundtrip, wait=wait or WAIT
        )

    if name == "local":
        yield Engine(state.device, 1, local)
        return
    try:
        from .ray_maker import RayMaker, open_cluster
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ValueError('--prior_engine ray needs Ray: pip install "motionenhancer[ray]"') from error
    if state.num_processes > 1:
        # Each process would start a cluster of its own on the same GPUs.
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
    with open_cluster(address, actors, cpus or 1, state.num_processes, wait or WAIT) as cluster:
        yield Engine(cluster.device, cluster.teachers, partial(RayMaker, cluster))
