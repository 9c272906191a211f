"""What capture adds to a step, in processor time on one thread: ``python benchmarks/capture_cost.py``.

Plain and captured steps take turns, their order changing each round: the median of the rounds' ratios with
its quartiles, and the ratio of the fastest captured to the fastest plain step. Processor time leaves out what
other processes of a busy machine take, but not what they do to its caches: there the second is the truer one.
Memory is the most that a step holds above what was held before it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "motionenhancer"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure import device
from measure.memory import peak_bytes
from measure.sampler import verify
from measure.student_capture import DEEP_STUDENTS, work


def seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Processor time of each round of each call; the calls take turns."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for call, found in list(zip(calls, spent, strict=True))[:: -1 if turn % 2 else 1]:
            began = time.process_time()
            call()
            found.append(time.process_time() - began)
    return spent


def main(argv: list[str] | None = None) -> int:
    """Print one line a case; 1 where a step's results are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="pairs of steps a case (%(default)s)")
    parser.add_argument("--size", choices=tuple(DEEP_STUDENTS), default="scaled")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    versions = device.versions()
    print(f"{device.name()}, torch {versions['torch']}, transformers {versions['transformers']}")
    times = f"{'captured / plain':>18}{'(quartiles)':>16}{'fastest':>10}"
    print(f"{'deep student':32}{times}{'eager / captured memory':>26}")
    for shape in DEEP_STUDENTS[options.size]:
        step = work(shape)
        wrong = {name: verify(step, name) for name in step.roles}
        if any(wrong.values()):
            print(f"{shape.case:32}REFUSED: {wrong}")
            return 1
        calls = {name: partial(call, *step.inputs[0]) for name, call in step.roles.items()}
        held = {name: peak_bytes(call) for name, call in calls.items()}
        gc.collect()
        gc.disable()
        ours, plain = seconds([calls["ours"], calls["plain step"]], options.rounds)
        gc.enable()
        ratios = sorted(one / other for one, other in zip(ours, plain, strict=True))
        quarter = len(ratios) // 4
        spread = f"({ratios[quarter]:.3f}–{ratios[-1 - quarter]:.3f})"
        memory = held["output_attentions=True"] / held["ours"]
        times = f"{statistics.median(ratios):>18.3f}{spread:>16}{min(ours) / min(plain):>10.3f}"
        print(f"{shape.case:32}{times}{memory:>26.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
