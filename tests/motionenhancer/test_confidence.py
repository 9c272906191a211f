from __future__ import annotations

import math

import pytest
import torch

from motionenhancer.priors.confidence import prior_confidence

GRID = (4, 3, 5)


def one_place_a_frame(places: list[int]) -> torch.Tensor:
    rows = torch.zeros(1, *GRID)
    for frame, place in enumerate(places):
        rows[0, frame].view(-1)[place] = 1.0
    return rows.flatten(1)


def test_uniform_is_no_confidence_and_scale_does_not_matter() -> None:
    nothing = {"concentration": 0.0, "variation": 0.0, "confidence": 0.0}
    assert prior_confidence(torch.ones(3, 60), GRID) == nothing
    assert prior_confidence(torch.full((3, 60), 1e-5).half(), GRID) == nothing


def test_a_moving_point_is_surer_than_a_still_one() -> None:
    moving, still = (prior_confidence(one_place_a_frame(p), GRID) for p in ([0, 1, 2, 3], [7, 7, 7, 7]))
    expected = 1 - math.log(4) / math.log(60)
    assert moving["concentration"] == pytest.approx(expected, abs=1e-5)
    assert still["concentration"] == pytest.approx(expected, abs=1e-5)
    assert (moving["variation"], still["variation"]) == (1.0, 0.0)
    assert moving["confidence"] == pytest.approx(math.sqrt(expected), abs=1e-5)
    assert still["confidence"] == 0.0


def test_half_moved() -> None:
    rows = torch.zeros(1, 2, 1, 3)
    rows[0, 0, 0], rows[0, 1, 0] = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert prior_confidence(rows.flatten(1), (2, 1, 3))["variation"] == 0.5


def test_degenerate_maps_stay_in_range() -> None:
    for rows, grid in (
        (torch.ones(2, 1), (1, 1, 1)),
        (torch.zeros(2, 60), GRID),
        (torch.rand(5, 15), (1, 3, 5)),
        (torch.rand(5, 4), (4, 1, 1)),
    ):
        assert all(0.0 <= value <= 1.0 for value in prior_confidence(rows, grid).values())


def test_a_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="60 columns"):
        prior_confidence(torch.ones(1, 60), (2, 2, 2))
