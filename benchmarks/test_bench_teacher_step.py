"""A teacher's whole evaluation with and without reading its attention."""

import pytest
from measure.plan import planned
from measure.teacher_step import plans

pytest.importorskip("diffusers", reason="diffusers is not installed: no teacher to evaluate")


@planned(plans)
def test_teacher_step(measure):
    measure()
