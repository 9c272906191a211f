"""Columns and sums of a student's attention with their gradients, against the map."""

from measure.plan import planned
from measure.student_entries import column_plans, sum_plans


@planned(column_plans)
def test_attention_columns(measure):
    measure()


@planned(sum_plans)
def test_attention_sums(measure):
    measure()
