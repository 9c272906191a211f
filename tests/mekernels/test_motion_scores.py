import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, rand, randn

import mekernels
from mekernels import MotionScores, motion_scores, native, reference

BACKENDS = ["torch", "reference"] + ([] if native.machine() else ["native"])


def case(seed=0, heads=3, frames=4, positions=5, dtype=torch.float64):
    diagonal = rand(heads, frames, frames, positions, seed=seed, dtype=dtype)
    tau = rand(heads, seed=seed + 1, dtype=dtype)
    square_sum = diagonal.square().sum((1, 2, 3)) * (1 + rand(heads, seed=seed + 2, dtype=dtype))
    return diagonal, tau, square_sum


@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 4),
    frames=st.one_of(st.integers(1, 6), st.sampled_from([63, 64, 65, 70])),
    positions=st.integers(1, 4),
)
def test_against_the_reference(seed, heads, frames, positions):
    inputs = case(seed, heads, frames, positions)
    actual = motion_scores(*inputs)
    expected = reference.motion_scores(*inputs)
    for one, other in zip((actual.dfc, actual.tcs, actual.dsr), expected, strict=True):
        finite = torch.isfinite(other)
        assert torch.equal(one[~finite], other[~finite])
        assert_exact(one[finite], other[finite], 1e-10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_rule(dtype, backend, seed):
    if backend == "native" and dtype != torch.float32:
        pytest.skip("the native kernel takes float32 only")
    inputs = case(seed, heads=5, frames=7, positions=33, dtype=dtype)
    with mekernels.use_backend(backend):
        actual = motion_scores(*inputs)
    exact = reference.motion_scores(*(tensor.double() for tensor in inputs))
    plain = reference.motion_scores(*inputs)
    for one, other, third in zip((actual.dfc, actual.tcs, actual.dsr), exact, plain, strict=True):
        assert one.dtype == torch.float32
        assert_error_rule(one, other, third)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_by_hand(backend):
    rows = [[1, 1, 0, 1, 1], [0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    diagonal = torch.stack([torch.tensor(rows), torch.zeros(5, 5)], -1)[None]
    with mekernels.use_backend(backend):
        scores = motion_scores(diagonal, torch.tensor([0.5]), torch.tensor([15.0]))
    torch.testing.assert_close(scores.dfc, torch.tensor([5 / 10]))
    torch.testing.assert_close(scores.tcs, torch.tensor([(5 / 3 + 0) / 2]))
    torch.testing.assert_close(scores.dsr, torch.tensor([5 / 50]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_are_strict_for_tcs_and_not_for_dsr(backend):
    with mekernels.use_backend(backend):
        scores = motion_scores(torch.full((1, 2, 2, 3), 0.25), torch.tensor([0.25]), torch.tensor([1.75]))
    assert (scores.dfc.item(), scores.tcs.item(), scores.dsr.item()) == (0.75, 0.0, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_denominators(backend):
    diagonal = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(4, 1, 1, 1).repeat(1, 1, 1, 2)
    square_sum = torch.tensor([1.0, 0.0, 2.0, 3.0])
    with mekernels.use_backend(backend):
        assert motion_scores(diagonal, torch.zeros(4), square_sum).dfc.tolist() == [math.inf, 0, math.inf, 0]
        # With one position nothing is off the diagonal, so the rounding of the sum must not matter.
        one = motion_scores(diagonal[..., :1], torch.zeros(4), square_sum * 1.0001)
    assert one.dfc.tolist() == [math.inf, 0, math.inf, 0]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_nan_is_kept_to_its_head(backend):
    diagonal, tau, square_sum = case(dtype=torch.float32, heads=4)
    diagonal[0, 1, 2, 3] = math.nan
    tau[1] = math.nan
    square_sum[2] = math.nan
    with mekernels.use_backend(backend):
        scores = motion_scores(diagonal, tau, square_sum)
    assert scores.dfc.isnan().tolist() == [True, False, True, False]
    assert scores.tcs.isnan().tolist() == [True, True, False, False]
    assert scores.dsr.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    diagonal, tau, square_sum = case(dtype=torch.float32)
    with mekernels.use_backend(backend):
        expected = motion_scores(diagonal, tau, square_sum)
        actual = motion_scores(diagonal.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), tau, square_sum)
    for name in ("dfc", "tcs", "dsr"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))


def test_native_says_why_not():
    inputs = case()
    with mekernels.use_backend("native"), pytest.raises(mekernels.BackendError) as caught:
        motion_scores(*inputs)
    if not native.machine():
        assert "diagonal must be float32, is torch.float64" in str(caught.value)
        assert "square_sum must be float32" in str(caught.value)


@given(seed=st.integers(0, 99), heads=st.integers(1, 6))
def test_composite_against_the_reference(seed, heads):
    metrics = [randn(heads, seed=seed + index) for index in range(3)]
    if seed % 3 == 0:
        metrics[0][0] = math.inf
    assert_exact(MotionScores(*metrics).composite(), reference.composite(*metrics))


def test_a_constant_metric_contributes_nothing():
    varied = torch.tensor([1.0, 3.0])
    for constant in (0.1, math.inf, 0.0):
        scores = MotionScores(torch.full((2,), constant), varied, torch.full((2,), 0.3))
        assert scores.composite().tolist() == [-1, 1]
    assert MotionScores(*torch.ones(3, 1)).composite().tolist() == [0]


def test_an_infinite_ratio_counts_as_the_largest_finite_one():
    dfc = torch.tensor([1.0, math.inf, 3.0])
    composite = MotionScores(dfc, torch.zeros(3), torch.zeros(3)).composite()
    torch.testing.assert_close(composite, torch.tensor([-2.0, 1, 1]) / math.sqrt(2))


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(3, 4, 5, 2), ValueError, r"diagonal must have shape .* got \(3, 4, 5, 2\)"),
        (0, torch.zeros(3, 4, 4, 0), ValueError, "none zero"),
        (0, torch.zeros(4, 4, 5), ValueError, "diagonal must have 4 dimensions"),
        (
            0,
            torch.zeros(3, 4, 4, 5, dtype=torch.int32),
            TypeError,
            "diagonal must have a floating-point dtype",
        ),
        (1, torch.zeros(4), ValueError, r"mean_attention must have shape \(3,\) \(heads,\), got \(4,\)"),
        (2, torch.zeros(3, 1), ValueError, "square_sum must have 1 dimension"),
        (2, 3.0, TypeError, "square_sum must be a torch.Tensor, got float"),
    ],
)
def test_bad_arguments(index, value, error, message):
    inputs = list(case())
    inputs[index] = value
    with pytest.raises(error, match=message):
        motion_scores(*inputs)
