"""What the tests of Ray share: a cluster, and a teacher in its actors that does what a clip's file says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_store import made_for

from motionenhancer.data import content_digest
from motionenhancer.data.video import VideoError
from motionenhancer.priors import reader as reader_module
from motionenhancer.priors.maker import Made, PriorMaker, make_all
from motionenhancer.priors.prior import MotionPrior, PriorError
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import PriorRequest
from motionenhancer.priors.storage import prior_keys

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install motionenhancer[ray]")

from motionenhancer.priors.ray_maker import Cluster, RayMaker, open_cluster  # noqa: E402

SETTINGS = PriorSettings(steps=1)
NAME = prior_keys("t", SETTINGS)
SECONDS = 240


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """A cluster of two cores on this machine, started as the command starts one."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # On a busy machine workers at Ray's own niceness of 15 would hardly ever start.
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        init = ray.init
        patch.setattr(ray, "init", lambda **options: init(num_cpus=2, num_gpus=0, **options))
        for tries in range(3):
            try:
                engine = stack.enter_context(open_cluster("local", None, 1, 1))
                break
            except ValueError as error:
                # Ray gives a node 30 seconds to start, which is not always enough beside other work.
                if tries == 2 or "timed out during startup" not in str(error):
                    raise
        for module in (sys.modules[__name__], sys.modules[made_for.__module__]):
            ray.cloudpickle.register_pickle_by_value(module)
            stack.callback(ray.cloudpickle.unregister_pickle_by_value, module)
        yield engine
    assert not ray.is_initialized()


@dataclass
class Load:
    """Loads, in an actor, a teacher that does what a clip's file says.

    Attributes:
        folder: a clip that says "once" kills the first actor that reads it.
        error: raised instead; a number ends the actor's process.
        id: of the teacher.
        unseen: name of a file that the actor's node does not see.
    """

    folder: Path
    error: BaseException | int | None = None
    id: str = "t"
    unseen: str = ""

    def __call__(self, device: torch.device) -> Any:
        if isinstance(self.error, int):
            os._exit(self.error)
        if self.error is not None:
            raise self.error
        reader_module.read_frames = self.read_frames  # type: ignore[assignment]
        reader_module.extract_prior = self.extract_prior  # type: ignore[assignment]
        exists, unseen = Path.exists, self.unseen
        Path.exists = lambda path: path.name != unseen and exists(path)  # type: ignore[assignment, method-assign]
        return SimpleNamespace(id=self.id, device=device, max_frames=17, size=(16, 24))

    def read_frames(self, path: Path, **options: Any) -> SimpleNamespace:
        says = path.read_text()
        if says.startswith("kill"):
            os._exit(1)
        if says.startswith("once"):
            mark = self.folder / f"{says}.mark"
            if not mark.exists():
                mark.touch()
                os._exit(1)
        if says.startswith("broken"):
            raise VideoError(path, "is no video")
        if says.startswith("slow"):
            time.sleep(1)
        if says.startswith("asleep"):
            time.sleep(SECONDS)
        return SimpleNamespace(frames=np.frombuffer(says.encode(), np.uint8), timestamps=[0.0])

    def extract_prior(self, teacher: Any, frames: np.ndarray, text: str, **settings: Any) -> MotionPrior:
        assert settings.pop("times") == [0.0]
        says = frames.tobytes().decode()
        if says.startswith("blank"):
            raise PriorError("it has no word")
        if says.startswith("cuda"):
            raise RuntimeError("CUDA error: an illegal memory access")
        return made_for(text, PriorSettings(**settings), sum(frames.tolist()))


def request(folder: Path, says: str, **options: Any) -> PriorRequest:
    clip = folder / f"{says}.mp4"
    clip.write_text(says)
    text = f"{says}: text"
    return PriorRequest(clip, text, NAME(content_digest(clip), text), **options)


def ray_on(engine: Cluster, folder: Path, teachers: int = 1, cpus: int = 1, **load: Any) -> RayMaker:
    return RayMaker(replace(engine, teachers=teachers, cpus=cpus), Load(folder, **load), "t", SETTINGS)


def made_of(maker: PriorMaker, folder: Path, *says: str) -> list[Made | BaseException]:
    return [found for _, _, found in make_all([(s, request(folder, s)) for s in says], maker)]


def answer(future: Future[Made]) -> Made | BaseException:
    try:
        return future.result(SECONDS)
    except (Exception, CancelledError) as error:
        return error
