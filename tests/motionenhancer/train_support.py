"""What the tests of training share: a fast recipe, and the parts of a run without the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_world import World
from transformers import TrainerCallback

from motionenhancer.alignment.dataset import MotionCollator, MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.data import SkipLog, content_digest, read_samples
from motionenhancer.priors.maker import LocalMaker, Made, Stored, make_all
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.requests import request_priors
from motionenhancer.priors.storage import PriorStore, prior_keys
from motionenhancer.students import load_student
from motionenhancer.teachers import load_teacher, teacher_id
from motionenhancer.training.arguments import TrainArguments

FAST = {
    "ddim_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "video_fps": 4,
    "save_strategy": "no",
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
    "use_cpu": True,
}


def flags(world: World, out: Path, **options: object) -> list[str]:
    """Flags of a short run; priors that are missing are made beforehand unless their source is named."""
    if "prior_source" not in options:
        options = {"priors_first": True, **options}
    return world.flags(output_dir=out, **{**FAST, "prior_dir": out.parent / "priors", **options})


def shared_priors(world: World) -> Path:
    """A store for tests that need priors, but do not test how they are made."""
    return world.data.parent / "priors_of_all_tests"


class Died(BaseException):
    """A stand-in for a kill: no part of the run catches it."""


class Death(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Died


@contextlib.contextmanager
def dying(step: int) -> Iterator[None]:
    """Runs inside die once they have taken so many steps, before anything of that step is saved."""
    original = MotionTrainer.__init__

    def init(self: MotionTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Death(step))

    MotionTrainer.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        MotionTrainer.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def without_priors_of(ids: Collection[str]) -> Iterator[None]:
    """Runs inside see these samples without their priors, as if the teacher could not read them."""
    original = MotionDataset.__init__

    def init(self: MotionDataset, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for sample in ids:
            self.keys.pop(sample, None)

    MotionDataset.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        MotionDataset.__init__ = original  # type: ignore[method-assign]


def report_of(out: Path) -> dict:
    return json.loads((out / "motion_report.json").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


class Weights(TrainerCallback):
    """Keeps the model's weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append({k: v.detach().clone() for k, v in model.state_dict().items()})


def parts(world: World, tmp_path: Path, *, priors: bool = True):
    model, processor, family = load_student(world.student)
    samples = list(read_samples(world.data, world.videos, SkipLog()))
    # Priors follow from the world alone: made once, whatever student they are for.
    store, keys = PriorStore(shared_priors(world)), {}
    if priors:
        settings, skips = PriorSettings(steps=1), SkipLog()
        name = prior_keys(teacher_id(world.teacher), settings)
        pairs = request_priors(samples, "both", skips, name=name, digest=content_digest)
        maker = Stored(store, LocalMaker(lambda: load_teacher(world.teacher, "cpu"), settings), name)
        with closing(maker):
            keys = {s.id: r.key for s, r, made in make_all(pairs, maker) if isinstance(made, Made)}
        assert len(keys) == len(samples)
    dataset = MotionDataset(samples, family, processor, keys=keys, store=store, fps=4)
    return model, dataset, MotionCollator(family, processor)


def arguments(tmp_path: Path, **options: object) -> TrainArguments:
    settings = {k: v for k, v in FAST.items() if k not in ("ddim_steps", "video_fps")}
    return TrainArguments(output_dir=str(tmp_path / "out"), **{**settings, **options})
