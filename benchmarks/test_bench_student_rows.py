"""Attention rows of a student with their gradients, against the map and next to flash attention."""

from measure.plan import planned
from measure.student_rows import plans


@planned(plans)
def test_attention_rows(measure):
    measure()
