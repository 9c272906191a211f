"""A student's layer and its whole training step, with and without alignment."""

import pytest
from measure import student_layer, student_step
from measure.plan import planned

pytest.importorskip("transformers")


@planned(student_layer.plans)
def test_student_layer(measure):
    measure()


@planned(student_step.plans)
def test_student_step(measure):
    measure()
