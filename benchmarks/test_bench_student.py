"""A student's layer, a deep student's step, and a whole aligned step, with and without capture."""

import pytest
from measure import student_capture, student_layer, student_step
from measure.plan import planned

pytest.importorskip("transformers")


@planned(student_layer.plans)
def test_student_layer(measure):
    measure()


@planned(student_capture.plans)
def test_deep_student(measure):
    measure()


@planned(student_step.plans)
def test_student_step(measure):
    measure()
