"""Everything that is measured passes its check: the smallest size on any machine, larger ones on a GPU."""

import pytest
import torch
from measure import (
    alignment,
    scores,
    student_capture,
    student_entries,
    student_layer,
    student_readings,
    student_rows,
    student_step,
    teacher_layer,
)
from measure.sampler import verify

PLANS = {
    "teacher layer": teacher_layer.layer_plans,
    "diagonal attention": teacher_layer.diagonal_plans,
    "attention rows": student_rows.plans,
    "attention columns": student_entries.column_plans,
    "attention sums": student_entries.sum_plans,
    "readings without gradients": student_readings.plans,
    "student layer": student_layer.plans,
    "deep student": student_capture.plans,
    "student step": student_step.plans,
    "motion scores": scores.head_plans,
    "token motion scores": scores.token_plans,
    "alignment": alignment.plans,
}


def wrong(plans, size):
    found = {}
    for plan in plans(size):
        work = plan.build()
        assert set(plan.roles) <= set(work.roles)
        assert len(plan.roles) >= 2, "every figure needs a baseline"
        found.update({(plan.case, role): verify(work, role) for role in plan.roles})
    return {where: what for where, what in found.items() if what}


@pytest.mark.parametrize("name", PLANS)
def test_every_role_passes_its_check(name):
    assert wrong(PLANS[name], "tiny") == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PLANS)
def test_every_role_passes_its_check_on_a_gpu(name):
    assert wrong(PLANS[name], "scaled") == {}


def test_teacher_evaluation_passes_its_check():
    pytest.importorskip("diffusers")
    from measure import teacher_step

    assert wrong(teacher_step.plans, "tiny") == {}
