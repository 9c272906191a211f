"""Columns, sums and statistics of a student's attention, against the map and other methods."""

from measure.plan import planned
from measure.student_entries import column_plans, sum_plans
from measure.student_readings import plans


@planned(column_plans)
def test_attention_columns(measure):
    measure()


@planned(sum_plans)
def test_attention_sums(measure):
    measure()


@planned(plans)
def test_readings_without_gradients(measure):
    measure()
