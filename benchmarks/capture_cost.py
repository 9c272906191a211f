"""What capture adds to a step, in processor time on one thread: ``python benchmarks/capture_cost.py``.

Plain and captured steps take turns, their order changing each round; the median of the rounds' ratios says
what capture adds, with the quartiles. Processor time leaves out what other processes of a busy machine take,
but not what they do to its caches. Memory is the most that a step holds above what was held before it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
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


def ratios(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> list[float]:
    """Captured over plain step, sorted."""
    found = []
    for turn in range(rounds):
        spent = {}
        for call in (ours, plain) if turn % 2 else (plain, ours):
            began = time.process_time()
            call()
            spent[call] = time.process_time() - began
        found.append(spent[ours] / spent[plain])
    return sorted(found)


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
    print(f"{'deep student':32}{'captured / plain':>18}{'(quartiles)':>16}{'eager / captured memory':>26}")
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
        found = ratios(calls["ours"], calls["plain step"], options.rounds)
        gc.enable()
        quarter = len(found) // 4
        spread = f"({found[quarter]:.3f}–{found[-1 - quarter]:.3f})"
        memory = held["output_attentions=True"] / held["ours"]
        print(f"{shape.case:32}{statistics.median(found):>18.3f}{spread:>16}{memory:>26.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
