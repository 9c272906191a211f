"""λ over a run: the weight of the alignment in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class AlignmentSchedule:
    """λ as a function of the step.

    The paper (MotionEnhancer, arXiv 2606.06853) keeps λ constant; the other schedules are for ablations.

    Attributes:
        weight: the largest λ.
        schedule: "constant"; or from `weight` to `end_weight` at the last step, "linear" or as half a
            "cosine".
        warmup: number of steps in which λ first rises linearly to `weight`; below 1: a share of all steps.
        end_weight: λ at the end of a falling schedule.

    Raises:
        ValueError: the schedule is unknown, a number is out of range, or the end weight would not be used.

    Example:
        >>> falling = AlignmentSchedule(2.0, "linear", warmup=2)
        >>> [falling.at(step, 6) for step in range(6)]
        [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    """

    weight: float = 1.0
    schedule: str = "constant"
    warmup: float = 0.0
    end_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"--alignment_schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        for name, value in (("weight", self.weight), ("warmup", self.warmup)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--alignment_{name} must be a number >= 0, got {value}")
        if not 0 <= self.end_weight <= self.weight:
            raise ValueError(
                f"--alignment_end_weight must be from 0 to --alignment_weight ({self.weight}), "
                f"got {self.end_weight}"
            )
        if self.end_weight and self.schedule == "constant":
            raise ValueError(
                "--alignment_end_weight needs a falling --alignment_schedule, linear or cosine; "
                f"got {self.end_weight} with constant"
            )

    def warmup_steps(self, total: int) -> int:
        """Number of steps, of `total`, in which λ rises to `weight`."""
        return math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def at(self, step: int, total: int) -> float:
        """λ of optimizer step `step`, counted from 0, of `total`."""
        rising = self.warmup_steps(total)
        if step < rising:
            # λ of the first step is above 0: with λ = 0 that step would only measure.
            return self.weight * (step + 1) / rising
        if self.schedule == "constant":
            return self.weight
        share = min(1.0, (step - rising) / max(1, total - rising))
        left = 1.0 - share if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.end_weight + (self.weight - self.end_weight) * left
