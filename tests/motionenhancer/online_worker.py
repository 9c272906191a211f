"""Trainings inside one launch of several CPU processes whose teachers are looked at when they are let go.

`torchrun ... online_worker.py runs.json`: runs as for train_worker.py. Each process writes what it saw to
teacher-<run>-<rank>.json beside the file of runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train_worker

from motionenhancer.alignment.online import OnlinePriors
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.teachers import load_teacher

PARTS = ("transformer", "vae", "text_encoder")


def digest(teacher: Any) -> float:
    """A number that changes if a weight is missing, split or moved."""
    total = 0.0
    for part in PARTS:
        for name, tensor in getattr(teacher.pipeline, part).state_dict().items():
            assert type(tensor) is torch.Tensor, (part, name, type(tensor))
            total += float(tensor.double().abs().sum()) * (1 + len(name) % 7) + tensor.numel()
    return total


def look(online: OnlinePriors, trainer: MotionTrainer) -> dict[str, Any]:
    teacher = getattr(online.maker, "maker", online.maker).ready()
    modules = [getattr(teacher.pipeline, part) for part in PARTS]
    mine = {id(p) for module in modules for p in module.parameters()}
    students = {id(p) for p in trainer.model_wrapped.parameters()} | {
        id(p) for p in trainer.model.parameters()
    }
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return {
        "digest": digest(teacher),
        "kinds": sorted({type(m).__name__ for m in modules}),
        "student": type(trainer.model_wrapped).__name__,
        "shared": len(mine & (students | optimized)),
        "wants gradients": sum(p.requires_grad for module in modules for p in module.parameters()),
        "has gradients": sum(p.grad is not None for module in modules for p in module.parameters()),
    }


def main(runs: Path) -> None:
    finish, init = OnlinePriors.judge, MotionTrainer.__init__
    held: dict[str, Any] = {}

    def build(self: MotionTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        held["trainer"] = self

    def judge(self: OnlinePriors, total: Any, *, final: bool = False) -> None:
        finish(self, total, final=final)
        if final:
            seen.append(look(self, held["trainer"]))

    seen: list[dict[str, Any]] = []
    MotionTrainer.__init__ = build  # type: ignore[method-assign]
    OnlinePriors.judge = judge  # type: ignore[method-assign]
    train_worker.main(runs)
    rank = dist.get_rank()
    # What transformers is told under FSDP with RAM-efficient loading: only the first process gets weights.
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    teacher = json.loads(runs.read_text())[0]["teacher"]
    seen.append({"digest": digest(load_teacher(teacher, "cpu"))})
    (runs.parent / f"teacher-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # DeepSpeed on CPUs hangs in its destructors after everything is done.
    os._exit(0)
