import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, rand, randn

from mekernels import reference, resample_rows, use_backend

grids = st.tuples(*[st.integers(1, 5)] * 3)


@given(
    seed=st.integers(0, 99),
    batch=st.integers(0, 2),
    rows=st.integers(0, 3),
    source=grids,
    target=grids,
    same=st.booleans(),
    normalize=st.booleans(),
    signed=st.booleans(),
)
def test_values_and_gradients_against_the_reference(
    seed, batch, rows, source, target, same, normalize, signed
):
    target = source if same else target
    draw = randn if signed else rand
    maps = draw(rows, batch, math.prod(source), seed=seed).transpose(0, 1).requires_grad_()
    expected = reference.resample_rows(maps, source, target, normalize=normalize)
    actual = resample_rows(maps, source, target, normalize=normalize)
    if normalize and expected.numel() and expected.abs().max() > 1e3:
        return  # the sum of a row is nearly zero, which attention never has
    assert_exact(actual, expected, 1e-9)
    weights = randn(*expected.shape, seed=seed)
    wanted = torch.autograd.grad(expected, maps, weights)[0]
    assert_exact(torch.autograd.grad(actual, maps, weights)[0], wanted, 1e-8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("source", "target"), [((4, 7, 5), (9, 3, 11)), ((3, 4, 5), (3, 4, 5))])
def test_error_rule(dtype, seed, source, target):
    maps = rand(2, 3, math.prod(source), seed=seed, dtype=dtype)
    runs = []
    for function, tensor in (
        (resample_rows, maps.clone()),
        (reference.resample_rows, maps.double()),
        (reference.resample_rows, maps.clone()),
    ):
        result = function(tensor.requires_grad_(), source, target)
        weights = randn(*result.shape, seed=seed).to(result.dtype)
        runs.append((result.detach(), torch.autograd.grad(result, tensor, weights)[0]))
    actual, exact, plain = runs
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    assert_error_rule(actual[0], exact[0], plain[0])
    assert_error_rule(actual[1], exact[1], plain[1], factor=3.0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("source", "target"), [((2, 1, 3), (3, 2, 2)), ((2, 1, 3), (2, 1, 3))])
def test_gradcheck(normalize, source, target):
    maps = rand(2, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: resample_rows(t, source, target, normalize=normalize), maps)


def test_zero_rows_stay_zero_with_zero_gradient():
    maps = torch.zeros(1, 2, 8)
    maps[0, 1] = 1
    maps.requires_grad_()
    result = resample_rows(maps, (2, 2, 2), (3, 3, 3))
    assert (result[0, 0] == 0).all()
    torch.testing.assert_close(result[0, 1], torch.full((27,), 1 / 27))
    (gradient,) = torch.autograd.grad(result.square().sum(), maps)
    assert (gradient[0, 0] == 0).all()
    assert gradient.isfinite().all()


def test_rows_sum_to_one_however_small():
    maps = rand(1, 3, 60, dtype=torch.float32) * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    result = resample_rows(maps, (3, 4, 5), (5, 4, 3))
    torch.testing.assert_close(result.sum(-1), torch.ones(1, 3))


def test_input_is_left_alone():
    maps = rand(1, 2, 8)
    kept = maps.clone()
    for target in ((2, 2, 2), (1, 2, 3)):
        result = resample_rows(maps, (2, 2, 2), target, normalize=False)
        result.zero_()
    assert torch.equal(maps, kept)


def test_list_grids_and_the_reference_backend():
    maps = rand(1, 2, 8)
    expected = resample_rows(maps, (2, 2, 2), (1, 3, 4))
    with use_backend("reference"):
        assert_exact(resample_rows(maps, [2, 2, 2], [1, 3, 4]), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": torch.zeros(2, 8)}, ValueError, "maps must have 3 dimensions"),
        ({"maps": torch.zeros(1, 2, 9)}, ValueError, r"the 8 tokens of grid_in \(2, 2, 2\), got 9"),
        (
            {"maps": torch.zeros(1, 2, 8, dtype=torch.int64)},
            TypeError,
            "maps must have a floating-point dtype",
        ),
        ({"grid_in": (2, 4)}, TypeError, r"grid_in must be three integers .* got \(2, 4\)"),
        (
            {"grid_out": (2, 0, 2)},
            ValueError,
            r"grid_out must be at least 1 in every dimension, got \(2, 0, 2\)",
        ),
        ({"grid_out": (2, 1.5, 2)}, TypeError, "grid_out must be three integers"),
        ({"grid_out": 8}, TypeError, "grid_out must be three integers"),
        ({"normalize": None}, TypeError, "normalize must be a bool, got NoneType"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"maps": torch.zeros(1, 2, 8), "grid_in": (2, 2, 2), "grid_out": (1, 2, 3)} | change
    with pytest.raises(error, match=message):
        resample_rows(**arguments)
