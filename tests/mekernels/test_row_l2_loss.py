import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, rand, randn

from mekernels import reference, row_l2_loss, use_backend


@given(
    seed=st.integers(0, 99),
    batch=st.integers(0, 3),
    rows=st.integers(0, 4),
    tokens=st.integers(0, 9),
    masked=st.booleans(),
)
def test_values_and_gradients_against_the_reference(seed, batch, rows, tokens, masked):
    student = randn(tokens, rows, batch, seed=seed).permute(2, 1, 0).requires_grad_()
    teacher = randn(batch, rows, tokens, seed=seed + 1).requires_grad_()
    mask = randn(batch, rows, seed=seed + 2) > 0 if masked else None
    expected, actual = reference.row_l2_loss(student, teacher, mask), row_l2_loss(student, teacher, mask)
    assert_exact(actual, expected)
    wanted = torch.autograd.grad(expected, (student, teacher), materialize_grads=True)
    for one, other in zip(torch.autograd.grad(actual, (student, teacher)), wanted, strict=True):
        assert_exact(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_rule(dtype, seed):
    student, teacher = (rand(3, 5, 211, seed=seed + index, dtype=dtype) for index in (0, 50))
    runs = []
    for function, pair in (
        (row_l2_loss, (student.clone(), teacher.clone())),
        (reference.row_l2_loss, (student.double(), teacher.double())),
        (reference.row_l2_loss, (student.clone(), teacher.clone())),
    ):
        result = function(*(tensor.requires_grad_() for tensor in pair))
        runs.append((result.detach(), *torch.autograd.grad(result, pair)))
    actual, exact, plain = runs
    assert actual[0].dtype == torch.float32
    assert_error_rule(actual[0], exact[0], plain[0])
    for index in (1, 2):
        assert actual[index].dtype == dtype
        assert_error_rule(actual[index], exact[index], plain[index], factor=3.0)


def test_dtypes_may_differ():
    student, teacher = rand(1, 2, 5, dtype=torch.float32).requires_grad_(), rand(1, 2, 5, dtype=torch.float16)
    loss = row_l2_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, row_l2_loss(student, teacher.float()))
    loss.backward()
    assert student.grad.dtype == torch.float32


def test_gradcheck():
    student, teacher = (randn(2, 3, 4, seed=seed).requires_grad_() for seed in (0, 1))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.autograd.gradcheck(lambda s, t: row_l2_loss(s, t, mask), (student, teacher))


def test_gradient_at_zero_is_zero():
    student = torch.zeros(1, 2, 3, requires_grad=True)
    teacher = torch.zeros(1, 2, 3)
    teacher[0, 1, 0] = 2
    row_l2_loss(student, teacher).backward()
    assert student.grad.tolist() == [[[0, 0, 0], [-0.5, 0, 0]]]


@pytest.mark.parametrize("value", [1e-38, 1e-42])
def test_tiny_differences_have_unit_gradients(value):
    student = torch.tensor([[[value]]], requires_grad=True)
    row_l2_loss(student, torch.zeros(1, 1, 1)).backward()
    torch.testing.assert_close(student.grad, torch.ones(1, 1, 1))


def test_masked_rows_are_never_read():
    student, teacher = rand(2, 2, 3).requires_grad_(), rand(2, 2, 3, seed=1)
    mask = torch.tensor([[True, False], [False, False]])
    expected = row_l2_loss(student[:1, :1], teacher[:1, :1])
    with torch.no_grad():
        student[0, 1] = math.nan
        teacher[1] = math.inf
    loss = row_l2_loss(student, teacher, mask)
    assert_exact(loss, expected)
    loss.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[~mask] == 0).all()


def test_samples_without_rows_leave_the_mean():
    student = torch.tensor([[[3.0, 4], [0, 1]], [[5, 12], [9, 9]]])
    teacher = torch.zeros_like(student)
    assert row_l2_loss(student, teacher, torch.tensor([[True, True], [True, False]])).item() == 8
    assert row_l2_loss(student, teacher, torch.tensor([[False, False], [True, False]])).item() == 13


def test_nothing_valid_is_zero_and_trains():
    student = torch.ones(2, 2, 3, requires_grad=True)
    loss = row_l2_loss(student, torch.zeros(2, 2, 3), torch.zeros(2, 2, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


def test_nan_in_a_valid_row_shows():
    student = torch.ones(1, 2, 3)
    student[0, 0, 0] = math.nan
    assert row_l2_loss(student, torch.zeros(1, 2, 3)).isnan()


def test_reference_backend_has_gradients():
    student, teacher = rand(2, 2, 3).requires_grad_(), rand(2, 2, 3, seed=1)
    expected = torch.autograd.grad(row_l2_loss(student, teacher), student)[0]
    with use_backend("reference"):
        assert_exact(torch.autograd.grad(row_l2_loss(student, teacher), student)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.zeros(2, 3)}, ValueError, "student must have 3 dimensions"),
        ({"teacher": torch.zeros(1, 2, 4)}, ValueError, r"teacher must have shape \(1, 2, 3\)"),
        (
            {"teacher": torch.zeros(1, 2, 3, dtype=torch.int64)},
            TypeError,
            "teacher must have a floating-point",
        ),
        (
            {"row_mask": torch.ones(1, 2)},
            TypeError,
            "row_mask must be a bool torch.Tensor, got torch.float32",
        ),
        ({"row_mask": [[True, True]]}, TypeError, "row_mask must be a bool torch.Tensor, got list"),
        ({"row_mask": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"row_mask must have shape \(1, 2\)"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        row_l2_loss(**({"student": torch.zeros(1, 2, 3), "teacher": torch.zeros(1, 2, 3)} | change))
