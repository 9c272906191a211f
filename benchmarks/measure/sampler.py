"""Checks a way of doing some work, then takes its time and memory, in turns with ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from . import device
from .checks import poisoned
from .dispatch import OURS, chosen
from .memory import peak_bytes
from .work import Work

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
MOST_ROUNDS = 200


class Sampler:
    """Hands one figure at a time to pytest-benchmark.

    Args:
        seconds: aimed at for each figure.
        deadline: of ``time.monotonic``; figures that would begin later are skipped.
        refused, skipped: lists that receive what was not measured and why.
    """

    def __init__(self, seconds: float, deadline: float, refused: list, skipped: list) -> None:
        self.seconds, self.deadline = seconds, deadline
        self.refused, self.skipped = refused, skipped

    def measure(self, benchmark: Any, work: Work, role: str) -> None:
        """Measure one role of one work, or refuse."""
        if time.monotonic() > self.deadline:
            self.skip(work, role, "the time budget was spent")
        if role not in work.roles:
            self.skip(work, role, "no such backend at this size")
        try:
            self._measure(benchmark, work, role)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            self.skip(work, role, f"does not fit in memory ({str(error).splitlines()[0][:90]})")

    def skip(self, work: Work, role: str, reason: str) -> None:
        self.skipped.append({"work": work.name, "case": work.case, "role": role, "reason": reason})
        pytest.skip(f"{work.name}, {work.case}, {role}: {reason}")

    def _measure(self, benchmark: Any, work: Work, role: str) -> None:
        wrong = verify(work, role)
        if wrong:
            self.refused.append({"work": work.name, "case": work.case, "role": role, "reason": wrong})
            pytest.fail(f"refused, its correctness check failed: {wrong}", pytrace=False)
        call = Turn(work, role)
        backend = chosen(call).get(work.op) if work.op else None
        peak = peak_bytes(call)
        partner = Turn(work, OURS) if role != OURS and not verify(work, OURS) else None
        once = _seconds(call) + (_seconds(partner) if partner else 0.0)
        rounds = max(3 if once > self.seconds / 3 else 7, min(MOST_ROUNDS, int(self.seconds / once)))
        alternate: list[float] = []

        def before() -> None:
            if partner:
                alternate.append(_seconds(partner))

        benchmark.group = f"{work.name} | {work.case}"
        benchmark.pedantic(call, setup=before, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:
            return
        # Warm-up rounds run the partner too.
        samples = list(benchmark.stats.stats.data)
        pairs, times = [samples, alternate[-len(samples) :]], None
        if device.on_gpu():
            times = device.queued_seconds([call, partner] if partner else [call], max(3, min(rounds, 50)))
            pairs = times.device
        benchmark.extra_info.update(
            work=work.name,
            case=work.case,
            role=role,
            backend=backend,
            length=work.length,
            shapes=work.shapes,
            copies_of_inputs=len(work.inputs),
            dtype=str(work.dtype).removeprefix("torch."),
            seconds=quantiles(samples),
            device_seconds=quantiles(pairs[0]) if times else None,
            host_seconds=quantiles(times.host[0]) if times else None,
            queue_filled=times.filled if times else None,
            over_ours=quantiles([a / b for a, b in zip(*pairs, strict=True)]) if partner else None,
            peak_bytes=peak,
            bytes=work.moved,
            operations=work.operations,
            floor_seconds=None
            if role in work.beside
            else device.floor_seconds(
                work.moved, work.operations, str(work.dtype).removeprefix("torch."), work.exponentials
            ),
            device=device.name(),
            versions=device.versions(),
        )


class Turn:
    """A role as a function without arguments; each call takes the next set of inputs."""

    def __init__(self, work: Work, role: str) -> None:
        self.work, self.call, self.turn = work, work.roles[role], 0

    def __call__(self) -> None:
        inputs = self.work.inputs
        self.turn = (self.turn + 1) % len(inputs)
        self.call(*inputs[self.turn])


def verify(work: Work, role: str) -> str:
    """What is wrong with a role's result on fresh tensors full of NaN; empty when nothing is."""
    if role not in work.verified:
        inputs = work.inputs[0]
        try:
            with poisoned():
                result = work.roles[role](*inputs)
                sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                assert sizes, "there is no result to check"
                assert all(sizes), "a result is empty, which proves nothing"
                work.check(role, result, inputs)
            work.verified[role] = ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            work.verified[role] = f"{type(error).__name__}: {error}"
    return work.verified[role]


def _seconds(call: Callable[[], Any]) -> float:
    began = device.clock()
    call()
    return device.clock() - began


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of samples."""
    values = torch.tensor(samples, dtype=torch.float64)
    return {label: values.quantile(q).item() for label, q in QUANTILES.items()}
