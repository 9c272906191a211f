"""λ over a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from motionenhancer.alignment.weight import AlignmentSchedule


def test_constant_is_the_papers() -> None:
    assert {AlignmentSchedule().at(step, 7) for step in range(7)} == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_goes_from_the_weight_to_the_end(schedule: str) -> None:
    falling = AlignmentSchedule(4.0, schedule, end_weight=1.0)
    values = [falling.at(step, 10) for step in range(11)]
    assert (values[0], values[10]) == (4.0, pytest.approx(1.0))
    assert values[5] == pytest.approx(2.5)
    assert all(later < earlier for earlier, later in pairwise(values))
    bend = values[1] - values[0] if schedule == "linear" else -1.5 * (1 - math.cos(math.pi / 10))
    assert values[1] - 4.0 == pytest.approx(bend)


def test_warm_up_rises_to_the_weight_and_never_rests_at_zero() -> None:
    assert [AlignmentSchedule(2.0, warmup=4).at(step, 100) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    share = AlignmentSchedule(2.0, "linear", warmup=0.1)
    assert share.warmup_steps(25) == 3, "a share is rounded up"
    assert share.at(2, 25) == share.at(3, 25) == 2.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": "step"}, "alignment_schedule"),
        ({"weight": -1.0}, "alignment_weight"),
        ({"weight": float("nan")}, "alignment_weight"),
        ({"warmup": -0.5}, "alignment_warmup"),
        ({"schedule": "linear", "end_weight": 2.0}, "alignment_end_weight"),
        ({"end_weight": 0.5}, "falling"),
    ],
)
def test_numbers_out_of_range(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AlignmentSchedule(**options)
