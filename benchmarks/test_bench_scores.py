"""Scores of heads and of tokens."""

from measure.plan import planned
from measure.scores import head_plans, token_plans


@planned(head_plans)
def test_motion_scores(measure):
    measure()


@planned(token_plans)
def test_token_motion_scores(measure):
    measure()
