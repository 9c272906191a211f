import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import assert_error_rule, rand, randn, strided
from native_support import cuda_on_host, needs_library, target  # noqa: F401

from mekernels import native

GRIDS = [
    ((2, 3, 4), (3, 5, 7)),
    ((8, 16, 16), (13, 30, 45)),
    ((5, 7, 19), (2, 3, 6)),
    ((1, 1, 1), (4, 5, 6)),
    ((4, 5, 6), (1, 1, 1)),
    ((3, 20, 33), (3, 20, 33)),
    ((3, 2, 50), (9, 2, 17)),
    ((9, 1, 40), (2, 64, 3)),
]


def interpolate(maps, grid_in, grid_out):
    volume = maps.unflatten(-1, grid_in)
    return torch.nn.functional.interpolate(volume, grid_out, mode="trilinear", align_corners=False).flatten(2)


def normalised(rows):
    total = rows.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(rows), rows / total.masked_fill(total == 0, 1))


def resampled(maps, grid_in, grid_out, normalize):
    rows = interpolate(maps, grid_in, grid_out)
    return normalised(rows) if normalize else rows


def mean_distance(student, teacher, mask):
    losses = []
    for one, other, valid in zip(student, teacher, mask, strict=True):
        if valid.any():
            losses.append(torch.linalg.vector_norm((one - other)[valid], dim=-1).mean())
    return torch.stack(losses).mean()


def size(grid):
    return math.prod(grid)


def case(grid_in, grid_out, seed=0, batch=2, rows=3):
    """Maps, teacher rows that sum to one, and a mask that leaves out one row."""
    maps = rand(batch, rows, size(grid_in), seed=seed, dtype=torch.float32).pow(3)
    teacher = rand(batch, rows, size(grid_out), seed=seed + 1, dtype=torch.float32).pow(3)
    mask = torch.ones(batch, rows, dtype=torch.bool)
    mask[0, -1] = False
    return maps, teacher / teacher.sum(-1, keepdim=True), mask


def with_gradient(function, maps):
    """Value and gradient of a scalar-valued or row-valued function."""
    maps = maps.detach().requires_grad_()
    value = function(maps)
    (gradient,) = torch.autograd.grad(value, maps)
    return value.detach(), gradient


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS)
def test_resample_rows(target, grid_in, grid_out, normalize):  # noqa: F811
    for seed in (0, 5):
        maps, _, _ = case(grid_in, grid_out, seed)
        grad = randn(2, 3, size(grid_out), seed=seed, dtype=torch.float32)

        def both(maps, grad=grad):
            rows = resampled(maps, grid_in, grid_out, normalize)
            (gradient,) = torch.autograd.grad(rows, maps, grad.to(maps.dtype))
            return rows.detach(), gradient

        exact, exact_gradient = both(maps.double().requires_grad_())
        plain, plain_gradient = both(maps.clone().requires_grad_())
        found, sums = native.resample_rows_forward(maps.to(target), grid_in, grid_out, normalize=normalize)
        assert_error_rule(found.cpu(), exact, plain)
        total = interpolate(maps.double(), grid_in, grid_out).sum(-1)
        torch.testing.assert_close(
            sums.cpu().double(), total if normalize else torch.ones_like(total), rtol=1e-6, atol=0
        )
        gradient = native.resample_rows_backward(
            grad.to(target), maps.to(target), grid_in, grid_out, normalize=normalize
        )
        if (
            size(grid_in) == 1 and normalize
        ):  # a single value scaled to one: the gradient is zero but for rounding
            assert gradient.abs().max() < 1e-5 * grad.abs().max() * maps.reciprocal().max()
        else:
            assert_error_rule(gradient.cpu(), exact_gradient, plain_gradient, factor=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_l2_loss(target, dtype):  # noqa: F811
    for seed, columns in [(0, 1), (1, 77), (2, 1025), (3, 17550)]:
        student, teacher, mask = case((1, 1, columns), (1, 1, columns), seed)
        student = student / student.sum(-1, keepdim=True)
        teacher = teacher.to(dtype)
        exact, exact_gradient = with_gradient(
            lambda s, t=teacher, m=mask: mean_distance(s, t.double(), m), student.double()
        )
        plain, plain_gradient = with_gradient(
            lambda s, t=teacher, m=mask: mean_distance(s, t.float(), m), student
        )
        loss, norms, weights = native.row_l2_loss_forward(
            student.to(target), teacher.to(target), mask.to(target)
        )
        assert_error_rule(loss.cpu(), exact, plain)
        assert norms[0, -1] == 0
        gradient = native.row_l2_loss_backward(
            torch.ones((), device=target), student.to(target), teacher.to(target), norms, weights
        )
        assert_error_rule(gradient.cpu(), exact_gradient, plain_gradient, factor=3)
        assert (gradient[0, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS)
def test_align(target, grid_in, grid_out, dtype):  # noqa: F811
    maps, teacher, mask = case(grid_in, grid_out, 3)
    teacher = teacher.to(dtype)

    def loss_of(maps):
        rows = resampled(maps, grid_in, grid_out, True)
        return mean_distance(rows, normalised(teacher.to(maps.dtype)), mask)

    exact, exact_gradient = with_gradient(loss_of, maps.double())
    plain, plain_gradient = with_gradient(loss_of, maps)
    loss, norms, weights, row_gradient = native.align_forward(
        maps.to(target), teacher.to(target), grid_in, grid_out, mask.to(target)
    )
    gradient = native.align_backward(torch.ones((), device=target), row_gradient, weights)
    assert norms[0, -1] == 0
    if size(grid_out) == 1:  # both rows are the number one, and the direction of their difference is noise
        assert norms.abs().max() < 1e-6
        return
    assert_error_rule(loss.cpu(), exact, plain)
    if size(grid_in) == 1:
        assert gradient.abs().max() < 1e-5 * maps.reciprocal().max()
    else:
        assert_error_rule(gradient.cpu(), exact_gradient, plain_gradient, factor=3)
    again, _, _, nothing = native.align_forward(
        maps.to(target), teacher.to(target), grid_in, grid_out, mask.to(target), gradient=False
    )
    assert nothing is None
    assert torch.equal(again, loss)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("normalize_teacher", [True, False])
def test_align_is_resample_and_row_l2(target, normalize, normalize_teacher):  # noqa: F811
    grid_in, grid_out = (3, 5, 7), (4, 9, 21)
    maps, teacher, _ = case(grid_in, grid_out, 8)
    rows = resampled(maps.double(), grid_in, grid_out, normalize)
    other = normalised(teacher.double() * 3) if normalize_teacher else teacher.double() * 3
    exact = torch.linalg.vector_norm(rows - other, dim=-1)
    _, norms, _, _ = native.align_forward(
        maps.to(target),
        (teacher * 3).to(target),
        grid_in,
        grid_out,
        normalize=normalize,
        normalize_teacher=normalize_teacher,
    )
    torch.testing.assert_close(norms.cpu().double(), exact, rtol=1e-6, atol=0)


@given(
    grid_in=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40)),
    grid_out=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
@needs_library
def test_any_grid_is_linear_and_transposed(grid_in, grid_out, seed):
    """<R x, g> = <x, R^T g> and a constant stays constant."""
    maps = randn(1, 2, size(grid_in), seed=seed, dtype=torch.float32)
    grad = randn(1, 2, size(grid_out), seed=seed + 1, dtype=torch.float32)
    rows, _ = native.resample_rows_forward(maps, grid_in, grid_out, normalize=False)
    back = native.resample_rows_backward(grad, maps, grid_in, grid_out, normalize=False)
    torch.testing.assert_close(
        rows.double(), interpolate(maps.double(), grid_in, grid_out), rtol=0, atol=3e-6
    )
    left, right = (rows.double() * grad).sum(), (maps.double() * back).sum()
    weight = rows.double().norm() * grad.norm() + maps.double().norm() * back.norm()
    assert abs(left - right) < 1e-6 * weight
    ones, _ = native.resample_rows_forward(torch.ones_like(maps), grid_in, grid_out, normalize=False)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-6)


def test_zero_rows_stay_zero(target):  # noqa: F811
    grid_in, grid_out = (2, 3, 5), (3, 4, 9)
    maps, teacher, _ = case(grid_in, grid_out)
    maps[1, 1] = 0
    rows, _ = native.resample_rows_forward(maps.to(target), grid_in, grid_out)
    assert (rows[1, 1] == 0).all()
    torch.testing.assert_close(rows.sum(-1).cpu(), (maps.sum(-1) > 0).float())
    grad = torch.ones_like(rows)
    assert (native.resample_rows_backward(grad, maps.to(target), grid_in, grid_out)[1, 1] == 0).all()
    _, norms, _, row_gradient = native.align_forward(maps.to(target), teacher.to(target), grid_in, grid_out)
    torch.testing.assert_close(norms[1, 1].cpu(), teacher[1, 1].norm())
    assert (row_gradient[1, 1] == 0).all()


def test_no_difference_has_no_gradient(target):  # noqa: F811
    student = rand(1, 2, 33, dtype=torch.float32).to(target)
    loss, norms, weights = native.row_l2_loss_forward(student, student)
    assert loss == 0
    one = torch.ones((), device=target)
    assert (native.row_l2_loss_backward(one, student, student, norms, weights) == 0).all()
    _, norms, _, gradient = native.align_forward(
        student, student, (1, 3, 11), (1, 3, 11), normalize=False, normalize_teacher=False
    )
    assert (norms == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_differences_have_unit_gradients(target, size):  # noqa: F811
    student = torch.full((1, 1, 5), size)
    _, norms, weights = native.row_l2_loss_forward(student.to(target), torch.zeros(1, 1, 5, device=target))
    one = torch.ones((), device=target)
    gradient = native.row_l2_loss_backward(
        one, student.to(target), torch.zeros_like(student).to(target), norms, weights
    )
    torch.testing.assert_close(gradient.cpu(), torch.full((1, 1, 5), 5**-0.5), rtol=1e-3, atol=0)


def test_masked_rows_are_never_read(target):  # noqa: F811
    grid_in, grid_out = (2, 3, 5), (3, 4, 9)
    maps, teacher, mask = case(grid_in, grid_out)
    expected = native.align_forward(maps.to(target), teacher.to(target), grid_in, grid_out, mask.to(target))
    maps[~mask] = math.nan
    teacher[~mask] = math.nan
    found = native.align_forward(maps.to(target), teacher.to(target), grid_in, grid_out, mask.to(target))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    student = teacher.roll(1, -1)
    loss, norms, weights = native.row_l2_loss_forward(student.to(target), teacher.to(target), mask.to(target))
    assert loss.isfinite()
    one = torch.ones((), device=target)
    gradient = native.row_l2_loss_backward(one, student.to(target), teacher.to(target), norms, weights)
    assert gradient.isfinite().all()
    nothing = torch.zeros_like(mask)
    loss, _, _, gradient = native.align_forward(
        maps.to(target), teacher.to(target), grid_in, grid_out, nothing.to(target)
    )
    assert loss == 0
    assert (gradient == 0).all()


def test_nan_stays_in_its_row(target):  # noqa: F811
    grid_in, grid_out = (2, 3, 5), (3, 4, 9)
    maps, teacher, _ = case(grid_in, grid_out)
    maps[0, 1, 4] = math.nan
    teacher[1, 2, -1] = math.nan
    _, norms, _, gradient = native.align_forward(maps.to(target), teacher.to(target), grid_in, grid_out)
    expected = [[False, True, False], [False, False, True]]
    assert norms.isnan().tolist() == expected
    assert gradient.isnan().any(-1).tolist() == expected
    rows, _ = native.resample_rows_forward(maps.to(target), grid_in, grid_out)
    assert rows.isnan().all(-1).tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e30])
def test_scale_of_the_input_does_not_matter(target, magnitude):  # noqa: F811
    grid_in, grid_out = (2, 5, 7), (3, 4, 9)
    maps, teacher, _ = case(grid_in, grid_out)
    exact = resampled(maps.double() * magnitude, grid_in, grid_out, True)
    rows, _ = native.resample_rows_forward((maps * magnitude).to(target), grid_in, grid_out)
    torch.testing.assert_close(rows.cpu().double(), exact, rtol=2e-6, atol=0)
    _, norms, _, gradient = native.align_forward(
        (maps * magnitude).to(target), teacher.to(target), grid_in, grid_out
    )
    assert norms.isfinite().all()
    assert gradient.isfinite().all()


@needs_library
def test_threads_do_not_change_the_result():
    grid_in, grid_out = (8, 16, 16), (13, 30, 45)
    maps, teacher, _ = case(grid_in, grid_out, rows=5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.align_forward(maps, teacher, grid_in, grid_out))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(results[0] * 2, (*results[1], *results[2]), strict=True):
        assert torch.equal(one, other)


def test_cuda_does_not_depend_on_the_order_of_threads(monkeypatch):
    """A missing barrier is detected when threads and blocks run in reverse order."""
    from native_support import run_on_host

    _, controls = cuda_on_host()
    monkeypatch.setattr(native.functions, "run", run_on_host)
    grid_in, grid_out = (4, 9, 11), (7, 13, 37)
    maps, teacher, mask = case(grid_in, grid_out, rows=4)
    diagonal = rand(3, 11, 11, 70, dtype=torch.float32)
    grad = randn(2, 4, size(grid_out), dtype=torch.float32)

    def everything():
        return [
            *native.align_forward(maps, teacher, grid_in, grid_out, mask),
            *native.resample_rows_forward(maps, grid_in, grid_out),
            native.resample_rows_backward(grad, maps, grid_in, grid_out),
            *native.motion_scores(diagonal, torch.full((3,), 0.5), torch.full((3,), 1e5)),
            native.token_motion_scores(teacher[0], grid_out[0]),
        ]

    forward = everything()
    controls.cuda_on_host_reverse(1)
    try:
        backward = everything()
    finally:
        controls.cuda_on_host_reverse(0)
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one, other)


MEMORY = """
import pathlib, re, torch
from mekernels import native

def resident(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", text).group(1))

def grown(function):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    result = function()
    return resident("VmHWM") - before

def align(rows):
    return native.align_forward(maps[:, :rows], teacher[:, :rows], (8, 16, 16), (13, 30, 45))

def interpolate():
    volume = maps.view(8, 64, 8, 16, 16)
    return torch.nn.functional.interpolate(volume, (13, 30, 45), mode="trilinear")

maps, teacher = torch.rand(8, 64, 2048), torch.rand(8, 64, 17550)
align(1)
print(grown(lambda: align(64)), grown(interpolate), teacher.nbytes)
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read the way Linux gives it")
def test_align_allocates_far_less_than_one_resampled_map():
    """The growth of the peak of a new process; an interpolation in it shows that the peak is measured."""
    done = subprocess.run([sys.executable, "-c", MEMORY], text=True, capture_output=True, check=True)
    align, interpolate, resampled = map(int, done.stdout.split())
    assert interpolate > 0.9 * resampled
    assert align < resampled / 3


def test_equal_rows_have_no_distance(target):  # noqa: F811
    """Half-precision rows scaled to sum to one on both sides: nothing is left of the rounding."""
    rows = rand(2, 3, 24, dtype=torch.float16)
    loss, norms, _, gradient = native.align_forward(
        rows.float().to(target), rows.to(target), (2, 3, 4), (2, 3, 4)
    )
    assert loss == 0
    assert (norms == 0).all()
    assert (gradient == 0).all()


@needs_library
def test_strided_and_empty_input():
    grid_in, grid_out = (2, 3, 5), (3, 4, 9)
    maps, teacher, mask = case(grid_in, grid_out)
    expected = native.align_forward(maps, teacher, grid_in, grid_out, mask)
    found = native.align_forward(
        strided(maps), strided(teacher), grid_in, grid_out, strided(mask.float()).bool()
    )
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert native.resample_rows_forward(maps[:0], grid_in, grid_out)[0].shape == (0, 3, size(grid_out))
    loss, norms, _, gradient = native.align_forward(maps[:, :0], teacher[:, :0], grid_in, grid_out)
    assert loss == 0
    assert norms.shape == (2, 0)
    assert gradient.shape == (2, 0, size(grid_in))


@needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.ones(1, 2, 6).double()}, TypeError, "student must have dtype torch.float32"),
        ({"student": torch.ones(1, 2, 7)}, ValueError, r"student must have shape \(B, R, 6\)"),
        ({"teacher": torch.ones(1, 2, 13)}, ValueError, r"teacher must have shape \(1, 2, 12\)"),
        ({"teacher": torch.ones(1, 2, 12).double()}, TypeError, "teacher must have dtype"),
        ({"grid_in": (1, 2)}, TypeError, "grid_in must be three integers"),
        ({"grid_out": (0, 3, 4)}, ValueError, "grid_out must be at least 1"),
        ({"row_mask": torch.ones(1, 2)}, TypeError, "row_mask must have dtype torch.bool"),
        ({"row_mask": torch.ones(2, 1, dtype=torch.bool)}, ValueError, "row_mask must have shape"),
    ],
)
def test_bad_input(change, error, message):
    good = {"student": torch.ones(1, 2, 6), "teacher": torch.ones(1, 2, 12)}
    good |= {"grid_in": (1, 2, 3), "grid_out": (1, 3, 4)}
    with pytest.raises(error, match=message):
        native.align_forward(**{**good, **change})
