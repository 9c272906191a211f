import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided

import mekernels
from mekernels import VideoTokens, diagonal_attention, reference


def case(video, seed=0, batch=1, heads=2, width=6, fold=1, dtype=torch.float64, scale=1.0):
    query = randn(batch, heads, video.length, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(batch, heads, fold * video.length, width, seed=seed + 1, dtype=dtype, scale=scale)
    lse = reference.attention_lse(query.double(), key.double())
    return query, key, lse.to(mekernels.checks.accumulate_dtype(dtype))


@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    text=st.integers(0, 3),
    text_first=st.booleans(),
    width=st.integers(1, 9),
    fold=st.integers(1, 3),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_against_the_map(seed, batch, heads, grid, text, text_first, width, fold, scale):
    video = VideoTokens(*grid, text=text, text_first=text_first)
    query, key, lse = case(video, seed, batch, heads, width, fold, scale=scale)
    attention = reference.fold_keys(reference.attention_map(query, key), fold)
    expected = reference.diagonal(reference.vision_block(attention, video), video)
    actual = diagonal_attention(strided(query), strided(key), lse.mT.contiguous().mT, video, fold=fold)
    assert_exact(actual, expected)
    with mekernels.use_backend("reference"):
        assert_exact(diagonal_attention(query, key, lse, video, fold=fold), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_rule(dtype, seed):
    video = VideoTokens(3, 3, 5, text=7)
    query, key, lse = case(video, seed, heads=3, width=32, fold=2, dtype=dtype)
    actual = diagonal_attention(query, key, lse, video, fold=2)
    assert actual.dtype == torch.float32
    exact = reference.diagonal_attention(query.double(), key.double(), lse.double(), video, fold=2)
    plain = reference.diagonal_attention(query, key, lse.to(dtype), video, fold=2)
    assert_error_rule(actual, exact, plain)


def test_softmax_scale_is_that_of_the_logsumexp():
    video = VideoTokens(2, 2, 2)
    query, key, _ = case(video)
    _, lse = mekernels.flash_attention(query, key, key, softmax_scale=0.7)
    expected = reference.diagonal(reference.attention_map(query, key, softmax_scale=0.7), video)
    assert_exact(diagonal_attention(query, key, lse, video, softmax_scale=0.7), expected)


VIDEO = VideoTokens(2, 1, 2, text=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"video": (2, 1, 2)}, TypeError, "video must be a mekernels.VideoTokens, got tuple"),
        ({"video": VideoTokens(3, 1, 2)}, ValueError, "query must have video.length = 6 tokens, got 5"),
        ({"fold": 2}, ValueError, r"fold must divide the number of keys \(5\), got 2"),
        (
            {"key": torch.zeros(1, 2, 10, 6, dtype=torch.float64)},
            ValueError,
            "key must have fold .* = 5 tokens",
        ),
        ({"key": torch.zeros(1, 1, 5, 6, dtype=torch.float64)}, ValueError, "key must have as many heads"),
        ({"lse": torch.zeros(1, 2, 6)}, ValueError, r"lse must have shape \(1, 2, 5\)"),
        ({"lse": torch.zeros(1, 2, 5, 1)}, ValueError, "lse must have 3 dimensions"),
        ({"lse": None}, TypeError, "lse must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_arguments(change, error, message):
    query, key, lse = case(VIDEO)
    with pytest.raises(error, match=message):
        diagonal_attention(**({"query": query, "key": key, "lse": lse, "video": VIDEO} | change))
