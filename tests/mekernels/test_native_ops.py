"""The ops on the native library: the same numbers as their torch composites, and autograd through them."""

import math

import pytest
import torch
from kernel_support import FLOATS, assert_error_rule, assert_exact, rand
from native_support import needs_library

import mekernels
from mekernels import BackendError, VideoTokens, reference, use_backend
from mekernels.align_rows import align_rows

GRIDS = [((2, 3, 4), (3, 5, 7)), ((4, 6, 9), (2, 3, 4)), ((3, 4, 5), (3, 4, 5))]


def scaled(rows):
    return rows / rows.sum(-1, keepdim=True)


def case(grid_in, grid_out, dtype, seed=0):
    student = rand(2, 3, math.prod(grid_in), seed=seed).pow(2).to(dtype)
    teacher = scaled(rand(2, 3, math.prod(grid_out), seed=seed + 1).pow(2)).to(dtype)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    return student, teacher, mask


def value_and_gradient(function, student):
    student = student.detach().requires_grad_()
    loss = function(student)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def by_reference(student, teacher, grid_in, grid_out, mask):
    rows = reference.resample_rows(student, grid_in, grid_out)
    return reference.row_l2_loss(rows, scaled(teacher), mask)


BACKENDS = ["torch", pytest.param("native", marks=needs_library), "auto"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS)
def test_align_rows(backend, dtype, grid_in, grid_out):
    student, teacher, mask = case(grid_in, grid_out, dtype)
    exact, exact_gradient = value_and_gradient(
        lambda s: by_reference(s, teacher.double(), grid_in, grid_out, mask), student.double()
    )
    plain, plain_gradient = value_and_gradient(
        lambda s: by_reference(s.float(), teacher.float(), grid_in, grid_out, mask), student
    )
    with use_backend(backend):
        loss, gradient = value_and_gradient(
            lambda s: align_rows(s, teacher, grid_in, grid_out, mask), student
        )
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_error_rule(loss, exact, plain)
    assert_error_rule(gradient, exact_gradient, plain_gradient, factor=3)
    assert (gradient[0, 1] == 0).all()


@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS)
def test_align_rows_in_double_precision(grid_in, grid_out):
    student, teacher, mask = case(grid_in, grid_out, torch.float64)
    expected = value_and_gradient(lambda s: by_reference(s, teacher, grid_in, grid_out, mask), student)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            found = value_and_gradient(lambda s: align_rows(s, teacher, grid_in, grid_out, mask), student)
        for one, other in zip(found, expected, strict=True):
            assert_exact(one, other)
    assert torch.autograd.gradcheck(
        lambda s: align_rows(s, teacher, grid_in, grid_out, mask), student.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_opcheck(dtype):
    student, teacher, mask = case((2, 3, 4), (3, 5, 7), dtype)
    ops = torch.ops.mekernels
    arguments = ([2, 3, 4], [3, 5, 7], True)
    torch.library.opcheck(ops.align_rows.default, (student.requires_grad_(), teacher, mask, *arguments))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.library.opcheck(
        ops.align_rows_backward.default,
        (torch.ones((), dtype=wide), rand(2, 3, dtype=wide), rand(2, 3, 24, dtype=wide)),
    )


@needs_library
def test_nothing_is_kept_when_no_gradient_is_wanted():
    student, teacher, mask = case((2, 3, 4), (3, 5, 7), torch.float32)
    expected = align_rows(student, teacher, (2, 3, 4), (3, 5, 7), mask)
    outputs = torch.ops.mekernels.align_rows_native(student, teacher, mask, [2, 3, 4], [3, 5, 7], False)
    assert torch.equal(outputs[0], expected)
    assert outputs[2].numel() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.ones(2, 24)}, ValueError, "student must have 3 dimensions"),
        ({"student": torch.ones(1, 2, 23)}, ValueError, r"student must have shape \(1, 2, 24\)"),
        ({"teacher": torch.ones(1, 3, 6)}, ValueError, r"teacher must have shape \(1, 2, 6\)"),
        ({"teacher": torch.ones(1, 2, 6, requires_grad=True)}, ValueError, "teacher must not require"),
        ({"grid_in": (2, 3)}, TypeError, "grid_in must be three integers"),
        (
            {"row_mask": torch.ones(1, 2)},
            TypeError,
            "row_mask must be a bool torch.Tensor, got torch.float32",
        ),
        ({"row_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"row_mask must have shape \(1, 2\)"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"student": torch.ones(1, 2, 24), "teacher": torch.ones(1, 2, 6)}
    good |= {"grid_in": (2, 3, 4), "grid_out": (1, 2, 3)}
    with pytest.raises(error, match=message):
        align_rows(**{**good, **change})


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_other_ops_match_their_composites(dtype):
    """Each op and its gradient on the native library against torch's composite in float64."""
    grid_in, grid_out = (2, 5, 9), (3, 7, 11)
    student, teacher, mask = case(grid_in, grid_out, dtype, seed=4)
    other = scaled(rand(2, 3, math.prod(grid_out), seed=9)).to(dtype)
    weight = rand(2, 3, math.prod(grid_out), seed=11)
    video = VideoTokens(*grid_out)
    calls = {
        "resample": (lambda s: (mekernels.resample_rows(s, grid_in, grid_out) * weight).sum(), student),
        "plain": (
            lambda s: (mekernels.resample_rows(s, grid_in, grid_out, normalize=False) * weight).sum(),
            student,
        ),
        "distance": (lambda s: mekernels.row_l2_loss(s, teacher.to(s.dtype), mask), other),
    }
    for call, tensor in calls.values():
        exact = value_and_gradient(call, tensor.double())
        with use_backend("torch"):
            plain = value_and_gradient(call, tensor)
        with use_backend("native"):
            found = value_and_gradient(call, tensor)
        assert_error_rule(found[0].double(), exact[0], plain[0], rounding=torch.float32)
        assert_error_rule(found[1], exact[1], plain[1], factor=3)
    with use_backend("native"):
        scores = mekernels.token_motion_scores(teacher[0], video)
    with use_backend("torch"):
        composite = mekernels.token_motion_scores(teacher[0], video)
    assert_error_rule(scores, mekernels.token_motion_scores(teacher[0].double(), video), composite)


@needs_library
def test_auto_takes_the_native_library_and_leaves_float64_to_torch(monkeypatch):
    used = []
    from mekernels.native import functions

    real = functions.run
    monkeypatch.setattr(functions, "run", lambda name, *rest: (used.append(name), real(name, *rest))[1])
    for dtype in (torch.float64, torch.float32):
        student, teacher, mask = case((2, 3, 4), (3, 5, 7), dtype)
        student.requires_grad_()
        rows = mekernels.resample_rows(student, (2, 3, 4), (3, 5, 7))
        mekernels.row_l2_loss(rows, teacher, mask).backward()
        align_rows(student, teacher, (2, 3, 4), (3, 5, 7), mask).backward()
        mekernels.token_motion_scores(teacher[0], VideoTokens(3, 5, 7))
        if dtype == torch.float64:
            assert used == []
    assert used == [
        *("resample_rows", "row_l2", "row_l2_backward", "resample_rows_backward"),
        *("align", "align_backward", "token_motion_scores"),
    ]


@needs_library
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_native_refuses_float64_by_name(name):
    tensors = {"student": torch.ones(1, 1, 4), "teacher": torch.ones(1, 1, 4)}
    tensors[name] = tensors[name].double()
    with (
        use_backend("native"),
        pytest.raises(BackendError, match=f"{name} must be float32, float16 or bfloat16"),
    ):
        align_rows(*tensors.values(), (1, 1, 4), (1, 1, 4))


@needs_library
def test_compiled():
    student, teacher, mask = case((2, 3, 4), (3, 5, 7), torch.float32)

    def loss(student):
        return align_rows(student, teacher, (2, 3, 4), (3, 5, 7), mask) * 2

    expected = value_and_gradient(loss, student)
    found = value_and_gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), student)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
