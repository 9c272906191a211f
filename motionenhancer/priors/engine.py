"""The flags that say where teachers run: in this process, or in actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import PartialState

from ..flags import Settings, setting
from ..teachers import Teacher
from .maker import WAIT, LocalMaker, PriorMaker
from .prior_settings import PriorSettings
from .reader import Source


@dataclass(frozen=True)
class Engine:
    """Starts teachers.

    Attributes:
        device: device of a teacher.
        teachers: number of teachers for this process.
        maker: `maker(load, teacher_id, settings, roundtrip=False)` returns a maker, to be closed by the
            caller. `load` returns the teacher on a device; Ray pickles it, so its paths must be absolute.
            `teacher_id` is that of the teacher that this process sees.
    """

    device: torch.device
    teachers: int
    maker: Callable[..., PriorMaker]


@dataclass
class MakerArguments(Settings):
    """Where priors are made. This does not change a prior."""

    prior_engine: str = setting(
        "local",
        "local: one teacher in each process. ray: teachers on the GPUs of a Ray cluster.",
        choices=("local", "ray"),
        aliases=["--engine"],
    )
    prior_workers: int = setting(
        2,
        "Number of threads that decode clips ahead of the teacher.",
        aliases=["--decode_workers", "--decode-workers"],
        least=1,
    )
    ray_address: str | None = setting(None, "Address of the cluster. Default: a running one, else a new one.")
    ray_workers: int | None = setting(None, "Number of teachers. Default: one per GPU.", least=1)
    ray_cpus: int | None = setting(None, "CPU cores of each teacher. Default: 1.", least=1)
    prior_wait: float | None = setting(
        None,
        "Stop if a prior takes N seconds or, with Ray, if there is no teacher for N seconds. Default: 3600.",
        aliases=["--ray_wait", "--ray-wait"],
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ray_address", "ray_workers", "ray_cpus"):
            if self.prior_engine != "ray" and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs --prior_engine ray, got --prior_engine {self.prior_engine}")

    @contextmanager
    def open(self) -> Iterator[Engine]:
        """Open the engine for the time of the context.

        Several processes join one cluster and share its GPUs, at least one teacher each.

        Raises:
            ValueError: Ray is not installed, or there is no cluster.
        """
        state = PartialState()
        if self.prior_engine == "local":
            yield Engine(state.device, 1, self._local)
            return
        try:
            from .ray_maker import RayMaker, open_cluster
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "ray":
                raise
            raise ValueError('--prior_engine ray needs Ray: pip install "motionenhancer[ray]"') from error
        address, wait = self.ray_address, self.prior_wait or WAIT
        if state.num_processes > 1:
            # Each process would start a cluster of its own on the same GPUs.
            address = address or os.environ.get("RAY_ADDRESS") or "auto"
        with open_cluster(
            address, self.ray_workers, self.ray_cpus or 1, state.num_processes, wait
        ) as cluster:
            yield Engine(cluster.device, cluster.teachers, partial(RayMaker, cluster))

    def _local(
        self,
        load: Callable[[torch.device], Teacher | Source],
        teacher_id: str,
        settings: PriorSettings,
        roundtrip: bool = False,
    ) -> LocalMaker:
        loads = partial(load, PartialState().device)
        count, wait = self.prior_workers, self.prior_wait or WAIT
        return LocalMaker(loads, settings, decode_workers=count, roundtrip=roundtrip, wait=wait)
