"""The goals of the kernels, measured here, the most important first: ``python benchmarks/goals.py FILE``.

Every goal is one line of JSON that is added to FILE as soon as it is known, so a run that is stopped keeps
what it measured. A goal is measured only after the result of what is timed passed its check. Times are those
of the device with work always waiting, so that they contain no time of the host; the host's time is a figure
of its own. Status 1: a goal was missed or failed, or on a GPU there was no time for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure import device, records, student_rows, teacher_layer
from measure.dispatch import label
from measure.sampler import Turn, verify
from measure.shapes import STUDENTS, TEACHERS, Student, Teacher
from measure.work import Work
from torch import Tensor

from mekernels import attention_rows, flash_attention, launch, native, use_backend

ROUNDS = 12
LAYERS = 6
"""Layers read before the statistics are asked for: an update may put work off until then."""
ROWS = 32
BACKEND = "triton" if launch.interpreted() else "auto"
"""Of our ops. In a rehearsal without a GPU the kernels are asked for, to be interpreted."""
OURS = label(BACKEND) if launch.interpreted() else "ours"


class Skipped(Exception):
    """What is missing here for a goal."""


class Goal(NamedTuple):
    """A figure and what it must be."""

    name: str
    unit: str
    measure: Callable[[], dict[str, Any]]
    """Gives the figure as ``value``, and more that is recorded beside it."""
    most: float | None = None
    least: float | None = None

    @property
    def wanted(self) -> str:
        """The bound as text, empty for a figure that is only recorded."""
        if self.most is not None:
            return f"at most {self.most:g}"
        return "" if self.least is None else f"at least {self.least:g}"

    def reached(self, value: float) -> bool:
        """Whether a figure keeps the bound."""
        return not (self.most is not None and value > self.most) and not (
            self.least is not None and value < self.least
        )


def checked(work: Work, *roles: str) -> None:
    """Raise where a result is wrong: nothing is measured of what is wrong."""
    for role in roles:
        wrong = verify(work, role)
        if wrong:
            raise AssertionError(f"{role} is wrong: {wrong}")


def timed(*calls: Callable[[], Any]) -> tuple[list[float], list[float], bool]:
    """Median seconds of each call on the device and on the host, and whether work always waited."""
    for call in calls:
        call()
    times = device.queued_seconds(list(calls), ROUNDS if device.on_gpu() else 2)
    one, other = ([statistics.median(samples) for samples in part] for part in (times.device, times.host))
    return one, other, times.filled


def update_share(shape: Teacher) -> dict[str, Any]:
    """Time of an update of the motion statistics over that of the attention it rides on."""
    work = teacher_layer.layer_work(shape)
    checked(work, OURS)
    kept = teacher_layer.statistics_of(shape)
    layers = [(query, key, flash_attention(query, key, value)[1]) for query, key, value in work.inputs]
    turns = cycle(layers)

    def update() -> None:
        with use_backend(BACKEND):
            for _ in range(LAYERS):
                kept.update(*next(turns), fold=shape.fold)
            kept.state_dict()

    (updating, attending), (host, _), filled = timed(update, Turn(work, "flash alone"))
    updating, host = updating / LAYERS, host / LAYERS
    return {
        "value": updating / attending,
        "update_seconds": updating,
        "flash_seconds": attending,
        "host_seconds": host,
        "queue_filled": filled,
    }


def rows_work(shape: Student) -> Work:
    """Attention rows with gradients, our result checked."""
    work = student_rows.work(shape)
    checked(work, OURS)
    return work


def rows_speedup(shape: Student) -> dict[str, Any]:
    """Time of whole maps over that of attention_rows, forward and backward."""
    work = rows_work(shape)
    checked(work, "eager map")
    (ours, eager), (host, _), filled = timed(Turn(work, OURS), Turn(work, "eager map"))
    return {
        "value": eager / ours,
        "ours_seconds": ours,
        "eager_seconds": eager,
        "host_seconds": host,
        "queue_filled": filled,
    }


def rows_host(shape: Student) -> dict[str, Any]:
    """Milliseconds of the host for one layer, forward and backward; beside it, what parts of it take."""
    work = rows_work(shape)
    query, key, _, above = work.inputs[0]
    rows, small = student_rows.chosen_rows(shape), torch.zeros(1, device=query.device)

    def forward() -> None:
        with use_backend(BACKEND), torch.no_grad():
            attention_rows(query, key, rows, shape.columns, causal=True)

    def empty_backward() -> None:
        torch.autograd.grad(_Empty.apply(query, key, above), (query, key), above)

    (ours, *_), host, filled = timed(Turn(work, OURS), forward, empty_backward, lambda: small.add_(1))
    parts = ("forward", "empty_backward", "one_launch")
    return {
        "value": 1e3 * host[0],
        "ours_seconds": ours,
        **{f"host_seconds_of_{name}": seconds for name, seconds in zip(parts, host[1:], strict=True)},
        "queue_filled": filled,
    }


class _Empty(torch.autograd.Function):
    """Allocates what the forward and the backward of attention_rows return, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, above: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return torch.empty_like(above)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        query, key = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), None


def rows_beside_flash(shape: Student) -> dict[str, Any]:
    """Time of attention_rows over that of causal flash attention, both forward and backward."""
    work = rows_work(shape)
    (ours, flash), (host, _), filled = timed(Turn(work, OURS), Turn(work, "flash alone"))
    floor = device.floor_seconds(work.moved, work.operations, str(work.dtype).removeprefix("torch."))
    return {
        "value": ours / flash,
        "ours_seconds": ours,
        "flash_seconds": flash,
        "floor_seconds": floor,
        "host_seconds": host,
        "queue_filled": filled,
    }


def waits(call: Callable[[], Any]) -> dict[str, Any]:
    """1 where the call waits for the device, else 0."""
    if not device.on_gpu():
        raise Skipped("needs a GPU")
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"value": 1, "why": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"value": 0}


def rows_waits(shape: Student) -> dict[str, Any]:
    """Whether attention_rows waits for the device."""
    return waits(Turn(rows_work(shape), OURS))


def update_waits(shape: Teacher) -> dict[str, Any]:
    """Whether an update of the motion statistics waits for the device."""
    work = teacher_layer.layer_work(shape)
    query, key, value = work.inputs[0]
    kept, lse = teacher_layer.statistics_of(shape), flash_attention(query, key, value)[1]
    return waits(lambda: kept.update(query, key, lse, fold=shape.fold))


def captured_step(case: int, size: str) -> dict[str, Any]:
    """Time of a student's training step with rows captured over that of a plain step."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    from measure import student_step

    work = student_step.plans(size)[case].build()
    checked(work, "ours", "plain step")
    (ours, plain), (host, plain_host), filled = timed(Turn(work, "ours"), Turn(work, "plain step"))
    return {
        "value": ours / plain,
        "ours_seconds": ours,
        "plain_seconds": plain,
        "host_seconds": host,
        "plain_host_seconds": plain_host,
        "loss_backend": "native" if native.cuda_available() else "torch",
        "queue_filled": filled,
    }


def goals(size: str) -> Iterator[Goal]:
    """All goals at a size, the most important first."""
    teachers, students = TEACHERS[size], STUDENTS[size]
    main = next((shape for shape in teachers if shape.case.endswith("49 frames")), teachers[0])
    four = next((shape for shape in students if shape.tokens == 4096), students[0])._replace(rows=ROWS)
    if size == "tiny":
        four = students[0]

    def share(shape: Teacher) -> Goal:
        name = f"motion statistics over flash attention, {shape.case}"
        return Goal(name, "x", lambda: update_share(shape), most=0.05)

    yield share(main)
    rows = f"attention_rows, forward and backward, {four.case}, {four.rows} rows"
    yield Goal(f"{rows}: eager map over ours", "x", lambda: rows_speedup(four), least=50)
    yield Goal(f"{rows}: host time", "ms", lambda: rows_host(four), most=0.15)
    yield Goal(f"{rows}: waits for the device", "", lambda: rows_waits(four), most=0)
    yield Goal(
        f"motion statistics, {main.case}: waits for the device", "", lambda: update_waits(main), most=0
    )
    for shape in students:
        if shape.tokens in (8192, 32768):
            name = (
                f"attention_rows over flash attention, forward and backward, {shape.case}, {shape.rows} rows"
            )
            yield Goal(name, "x", lambda shape=shape: rows_beside_flash(shape))
    yield from (share(shape) for shape in teachers if shape != main)
    yield Goal("captured over plain training step", "x", lambda: captured_step(0, size))


def take(goal: Goal, judged: bool) -> dict[str, Any]:
    """One entry of the results file."""
    began = time.monotonic()
    entry: dict[str, Any] = {"kind": "goal", "goal": goal.name, "unit": goal.unit, "wanted": goal.wanted}
    try:
        entry |= goal.measure()
        outcome = ("reached" if goal.reached(entry["value"]) else "missed") if goal.wanted else "recorded"
        entry["outcome"] = outcome if judged else "rehearsed"
    except Skipped as error:
        entry |= {"outcome": "skipped", "why": str(error)}
    except Exception as error:
        entry |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
    if device.on_gpu():
        torch.cuda.empty_cache()
    return entry | {"took_seconds": round(time.monotonic() - began, 1)}


def main(argv: list[str] | None = None) -> int:
    """Measure all goals; 1 where one was missed or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="receives one line of JSON a goal")
    parser.add_argument("--deadline", type=float, default=240.0, help="begin no goal after so many seconds")
    parser.add_argument("--size", choices=tuple(TEACHERS), default="real")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.deadline
    bad = False
    for goal in goals(options.size):
        if time.monotonic() > end:
            entry = {"kind": "goal", "goal": goal.name, "unit": goal.unit, "wanted": goal.wanted}
            entry |= {"outcome": "no time", "why": f"the {options.deadline:g} s for the goals were spent"}
        else:
            entry = take(goal, judged=device.on_gpu())
        records.append(options.file, **entry)
        print(records.summary([entry]), flush=True)
        bad |= entry["outcome"] in ("missed", "failed") or (entry["outcome"] == "no time" and device.on_gpu())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
