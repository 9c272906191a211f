"""Non-finite values reach exactly the results that depend on them, on every backend that runs on a CPU."""

import math

import nonfinite
import pytest
import torch
from kernel_support import rand, randn

import mekernels
from mekernels import VideoTokens, native, reference
from mekernels.attention_rows.composite import layer_attention_rows

VIDEO = VideoTokens(3, 2, 2, text=3)
FAST = ["torch"] + ([] if native.machine() else ["native"])


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("place", nonfinite.PLACES)
@pytest.mark.parametrize("options", list(nonfinite.OPTIONS))
@pytest.mark.parametrize("columns", list(nonfinite.COLUMNS))
def test_attention_rows(value, place, options, columns):
    nonfinite.compare("torch", place, value, nonfinite.COLUMNS[columns], nonfinite.OPTIONS[options])


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_key_that_an_explicit_mask_hides_is_not_read(value, kind):
    query, key = randn(1, 4, 9, 16), randn(1, 2, 9, 16, seed=1)
    rows, mask = torch.tensor([[1, 8]]), torch.ones(1, 1, 2, 9, dtype=torch.bool)
    mask[..., 5] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf).double()
    expected = layer_attention_rows([query, query], [key, key], rows, mask=given)
    key[:, :, 5] = value
    assert torch.equal(layer_attention_rows([query, query], [key, key], rows, mask=given), expected)


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_a_row_that_is_not_finite_is_so_at_columns_that_no_row_sees(reduce):
    query, key = randn(1, 2, 9, 8), randn(1, 2, 9, 8, seed=1)
    query[0, 0, 2] = math.nan
    rows, columns = torch.tensor([[2, 3]]), torch.tensor([[0, 8, -1]])
    options = {"causal": True, "reduce": reduce}
    for chosen in (slice(1, None), columns):
        with mekernels.use_backend("torch"):
            actual = mekernels.attention_rows(query, key, rows, chosen, **options)
        expected = reference.attention_rows(query, key, rows, chosen, **options)
        assert expected[..., 0, 1].isnan().any()
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_padding_does_not_read_the_first_row():
    query, key = randn(1, 2, 5, 8), randn(1, 2, 5, 8, seed=1)
    query[0, 0, 0] = math.nan
    rows = torch.tensor([[-1, 2]])
    for backend in ("reference", "torch"):
        with mekernels.use_backend(backend):
            assert mekernels.attention_rows(query, key, rows, torch.tensor([[0, -1]])).isfinite().all()


def test_key_ranges_are_any_64_bit_number():
    query, key = randn(1, 2, 5, 8), randn(1, 2, 5, 8, seed=1)
    rows = torch.tensor([[1, 2, 3, 4]])
    wide = torch.tensor([[[-(2**63), 2**63 - 1], [2**32, 2**33], [1, 2**32 + 1], [-(2**32), 3]]])
    narrow = torch.tensor([[[0, 5], [5, 5], [1, 5], [0, 3]]])
    for backend in ("reference", "torch"):
        with mekernels.use_backend(backend):
            actual, expected = (
                mekernels.attention_rows(query, key, rows, slice(None), key_range=limits)
                for limits in (wide, narrow)
            )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("which", range(3))
def test_diagonals(value, which):
    inputs = [randn(1, 2, 15, 8), randn(1, 2, 15, 8, seed=1), randn(1, 2, 15, seed=2)]
    inputs[which][0, 0, 7] = value
    with mekernels.use_backend("torch"):
        actual = mekernels.diagonal_attention(*inputs, VIDEO)
    torch.testing.assert_close(actual, reference.diagonal_attention(*inputs, VIDEO), equal_nan=True)


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("which", range(2))
def test_statistics_refuse_them(value, which):
    inputs = [randn(1, 2, 15, 8), randn(1, 2, 15, 8, seed=1)]
    inputs[which][0, 0, 7] = value
    for backend in ("reference", "torch"):
        statistics = mekernels.MotionStatistics(VIDEO, 2, sampled_rows="all")
        with mekernels.use_backend(backend):
            statistics.update(*inputs, reference.attention_lse(*inputs))
            with pytest.raises(ValueError, match="must be finite"):
                statistics.scores()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("which", range(2))
def test_motion_scores(backend, which):
    inputs = [rand(2, 3, 3, 4, dtype=torch.float32), torch.full((2,), 0.4), torch.full((2,), 99.0)]
    inputs[which][1] = math.nan
    with mekernels.use_backend(backend):
        actual = mekernels.motion_scores(*inputs)
    for name, expected in zip(("dfc", "tcs", "dsr"), reference.motion_scores(*inputs), strict=True):
        torch.testing.assert_close(getattr(actual, name), expected, equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", nonfinite.VALUES)
def test_token_scores(backend, value):
    rows = rand(3, 12, dtype=torch.float32)
    rows[1, 7] = value
    with mekernels.use_backend(backend):
        actual = mekernels.token_motion_scores(rows, VIDEO)
    torch.testing.assert_close(actual, reference.token_motion_scores(rows, VIDEO), equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("which", ["student", "teacher", "gradient"])
@pytest.mark.parametrize("op", ["row_l2_loss", "align_rows"])
def test_losses_and_their_gradients(backend, value, which, op):
    """A NaN in a row makes the loss and the gradient of that row NaN, never zero."""
    student, teacher = rand(1, 3, 12, dtype=torch.float32), rand(1, 3, 12, seed=1, dtype=torch.float32)
    if which != "gradient":
        {"student": student, "teacher": teacher}[which][0, 1, 7] = value
    grids = () if op == "row_l2_loss" else ((3, 2, 2), (3, 2, 2))
    found = []
    for name in (backend, "reference"):
        given = student.clone().requires_grad_()
        with mekernels.use_backend(name):
            loss = getattr(mekernels, op)(given, teacher, *grids)
        up = torch.tensor(value if which == "gradient" else 1.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, given, up)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
        torch.testing.assert_close(one[one.isfinite()], other[other.isfinite()])
