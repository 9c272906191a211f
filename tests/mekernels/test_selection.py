import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mekernels import MotionScores, reference, select_heads, select_tokens


@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0, math.inf]), min_size=1, max_size=9),
    ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1]),
)
def test_against_the_reference(scores, ratio):
    scores = torch.tensor(scores)
    for select in (select_heads, select_tokens):
        chosen = select(scores, ratio)
        assert chosen.dtype == torch.int64
        assert torch.equal(chosen, reference.select(scores, ratio))


def test_motion_scores_are_taken_by_their_composite():
    scores = MotionScores(torch.tensor([1.0, 5, 2, 4]), torch.ones(4), torch.ones(4))
    assert select_heads(scores).tolist() == [1, 3]
    assert select_heads(scores.composite()).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("scores", "ratio", "error", "message"),
    [
        (torch.zeros(0), 0.5, ValueError, "scores must have at least one entry, got none"),
        (torch.zeros(2, 2), 0.5, ValueError, "scores must have 1 dimension"),
        (torch.tensor([1, 2]), 0.5, TypeError, "scores must have a floating-point dtype, got torch.int64"),
        ([1.0], 0.5, TypeError, "scores must be a torch.Tensor, got list"),
        (torch.tensor([1.0, math.nan]), 0.5, ValueError, "scores must not contain NaN, got 1 of 2"),
        (torch.ones(2), 1.5, ValueError, "ratio must lie between 0 and 1, got 1.5"),
        (torch.ones(2), -0.1, ValueError, "ratio must lie between 0 and 1, got -0.1"),
        (torch.ones(2), math.nan, ValueError, "ratio must lie between 0 and 1, got nan"),
        (torch.ones(2), "half", TypeError, "ratio must be a float, got str"),
    ],
)
def test_bad_arguments(scores, ratio, error, message):
    for select in (select_heads, select_tokens):
        with pytest.raises(error, match=message):
            select(scores, ratio)
