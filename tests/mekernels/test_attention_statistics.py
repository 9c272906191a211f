"""Statistics of heads and logsumexps of rows against the reference, and gradients that go through these."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_exact, randn
from test_attention_entries import SHAPES, assert_same_statistics, case, limited, logsumexp, of_window
from test_attention_rows import pick

import mekernels
from mekernels import attention_columns, flash_attention, reference
from mekernels.attention_entries import composite


@settings(max_examples=100)
@given(
    **SHAPES,
    sinks=st.sampled_from([slice(0, 1), slice(0, 0), 3]),
    rows=st.sampled_from([None, slice(2, 6), slice(-3, None), slice(4, 2)]),
    video=st.sampled_from([None, slice(1, -1), slice(-3, None)]),
    period=st.sampled_from([None, 1, 2, 3, 2**40]),
    band=st.sampled_from([0, 0, 1, 2**40]),
)
def test_head_statistics_against_the_reference(
    seed,
    batch,
    heads,
    groups,
    queries,
    keys,
    width,
    causal,
    masked,
    window,
    softcap,
    bias,
    ranged,
    fold,
    chunk,
    sinks,
    rows,
    video,
    period,
    band,
):
    query, key = case(seed, batch, heads, groups, queries, fold * keys, width)
    sinks = sinks if isinstance(sinks, slice) else pick(batch, sinks, keys, seed)
    options, lse = limited(query, key, seed, causal, masked, window, softcap, bias, ranged, fold)
    options = of_window(options, rows, None)
    if period is not None:
        options |= {"video": video, "period": period, "diagonal_width": band}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "CHUNK_ELEMENTS", chunk)
        assert_same_statistics(query, key, lse, sinks=sinks, rows=rows, **options)


@settings(max_examples=100)
@given(**SHAPES, sunk=st.booleans())
def test_logsumexp_against_the_reference(
    seed,
    batch,
    heads,
    groups,
    queries,
    keys,
    width,
    causal,
    masked,
    window,
    softcap,
    bias,
    ranged,
    fold,
    chunk,
    sunk,
):
    query, key = case(seed, batch, heads, groups, queries, fold * keys, width)
    options, _ = limited(query, key, seed, causal, masked, window, softcap, bias, ranged, fold)
    sinks = [randn(heads * groups, seed=seed + 4)] if sunk else []

    def read(function):
        return lambda *given: function(*given[:2], sinks=given[2] if sunk else None, **options)

    wanted = graded_where_finite(read(reference.attention_lse), (query, key, *sinks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "CHUNK_ELEMENTS", chunk)
        found = graded_where_finite(read(mekernels.attention_lse), (query, key, *sinks))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one == -math.inf, other == -math.inf)
        assert_exact(one.nan_to_num(neginf=0), other.nan_to_num(neginf=0), 1e-11)


def test_a_sink_of_minus_infinity_changes_nothing():
    """It changes neither values nor gradients, also in a row that sees no key."""
    query, key = (randn(1, 2, 3, 4, seed=seed).requires_grad_() for seed in (0, 1))
    sinks = torch.tensor([-math.inf, 0.5], dtype=torch.float64, requires_grad=True)
    options = {"causal": True, "key_mask": torch.tensor([[False, True, True]])}
    plain = mekernels.attention_lse(query, key, **options)
    sunk = mekernels.attention_lse(query, key, sinks=sinks, **options)
    assert torch.equal(sunk[:, 0], plain[:, 0])
    wanted = torch.autograd.grad(plain[:, 0, 1:].sum(), (query, key))
    found = torch.autograd.grad(sunk[:, 0].sum(), (query, key, sinks))
    for one, other in zip(found, (*wanted, torch.zeros(2, dtype=torch.float64)), strict=True):
        assert torch.equal(one, other)


def graded_where_finite(function, inputs):
    """Values, and gradients of all values but -inf, for which the reference has no gradient."""
    inputs = [item.detach().clone().requires_grad_() for item in inputs]
    result = function(*inputs)
    weights = randn(*result.shape, seed=7).masked_fill(result == -math.inf, 0)
    gradients = torch.autograd.grad(result, inputs, weights, materialize_grads=True)
    return result.detach(), *(item.nan_to_num(nan=0) for item in gradients)


def test_statistics_of_heads_that_are_known():
    """A head with uniform attention, and a head whose rows look at the previous key."""
    code = torch.eye(8, dtype=torch.float64)
    query = torch.stack([torch.zeros_like(code), 500 * code.roll(1, 1)])[None].roll(-2, 3)
    key = code.expand(1, 2, -1, -1)
    _, lse = flash_attention(query, key, key)
    entropy, distance, sink, diagonal = mekernels.head_statistics(query, key, lse, rows=slice(2, 8), period=4)
    place = torch.arange(8.0, dtype=torch.float64)
    even = (place[2:, None] - place).abs().mean()
    assert_exact(entropy, torch.tensor([[math.log(8), 0]], dtype=torch.float64), 1e-9)
    assert_exact(distance, torch.tensor([[even, 1]], dtype=torch.float64), 1e-9)
    assert_exact(sink, torch.tensor([[1 / 8, 0]], dtype=torch.float64), 1e-9)
    assert_exact(diagonal, torch.tensor([[1 / 4, 0]], dtype=torch.float64), 1e-9)
    for width, count in ((0, 1), (2**40, 4)):
        layout = {"video": slice(2, 6), "period": 2**40, "diagonal_width": width}
        even = mekernels.head_statistics(query, key, lse, **layout).diagonal[:, 0]
        assert_exact(even, torch.tensor([count / 8], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(("fold", "band", "text_first"), [(1, 0, True), (2, 0, False), (2, 2, True)])
def test_the_share_of_the_diagonals_is_that_of_head_selection(fold, band, text_first):
    """By the op that reads diagonals, and by the naive set of pairs of the reference."""
    video = mekernels.VideoTokens(3, 2, 2, text=5, text_first=text_first)
    query, key = case(1, 2, 2, 1, video.length, fold * video.length, 8)
    lse = logsumexp(query, key)
    layout = {"video": video.vision_slice, "period": video.positions, "diagonal_width": band}
    found = mekernels.head_statistics(query, key, lse, fold=fold, **layout).diagonal
    attention = reference.fold_keys(reference.attention_map(query, key), fold)
    place = torch.arange(video.vision) % video.positions
    near = (place[:, None] - place).abs() <= band
    expected = (reference.vision_block(attention, video) * near).sum((-1, -2)) / video.vision
    assert_exact(found, expected)
    if not band:
        read = mekernels.diagonal_attention(query, key, lse, video, fold=fold)
        assert_exact(found, read.sum((-1, -2, -3)) / video.vision)
    frames = mekernels.head_statistics(
        query, key, lse, fold=fold, window=(4, 4), **layout | {"diagonal_width": 0}
    )
    own = mekernels.head_statistics(query, key, lse, fold=fold, window=(0, 0), **layout).diagonal
    read = mekernels.diagonal_attention(query, key, lse, video, fold=fold).sum(-1)
    beside = read.diagonal(1, -2, -1).sum(-1) + read.diagonal(-1, -2, -1).sum(-1)
    assert_exact(frames.diagonal - own, beside / video.vision)


@pytest.mark.parametrize(
    ("limits", "seeing"),
    [
        ({"causal": True, "key_mask": torch.tensor([[False, False, True, True]])}, 2),
        ({"window": (0, 0), "key_range": torch.tensor([[[0, 4], [2, 2], [2, 2], [3, 4]]])}, 2),
        ({"window": (-1, 2**31 - 1), "key_range": torch.tensor([[[4, 9], [-3, 0], [3, 1], [0, 4]]])}, 1),
        ({"key_mask": torch.tensor([[False, True, False, False]]), "fold": 2}, 4),
        ({"key_mask": torch.tensor([[False, False, False, False]])}, 0),
        (
            {
                "key_mask": torch.tensor([[True, False, False, False]]),
                "key_range": torch.tensor([[[0, 4], [1, 4], [0, 1], [2, 4]]]),
            },
            2,
        ),
    ],
)
def test_rows_that_see_no_key_are_left_out_although_their_logsumexp_is_finite(limits, seeing):
    """A sink, or a logsumexp with wider limits, makes the logsumexp of such rows finite."""
    query, key, lse = torch.zeros(1, 1, 4, 8), randn(1, 1, 4, 8).float(), torch.full((1, 1, 4), 0.5)
    found = mekernels.head_statistics(query, key, lse, sinks=slice(0, 4), **limits)
    total = mekernels.attention_sums(query, key, lse, over="columns", **limits).sum()
    torch.testing.assert_close(found.sink[0, 0], total / max(1, seeing))
    assert seeing == 0 or float(total) > 0


def test_a_row_of_which_a_bias_hides_everything_is_left_out():
    query, key = case(0, queries=4, keys=4)
    bias = torch.zeros(1, 1, 4, 4, dtype=query.dtype)
    bias[:, :, 1] = -math.inf
    lse = mekernels.attention_lse(query, key, bias=bias)
    every = mekernels.head_statistics(query, key, lse, sinks=slice(0, 4), bias=bias)
    torch.testing.assert_close(every.sink, torch.ones_like(every.sink))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("shape", [(1, 1, 4, 8), (2, 2, 4, 8), (1, 2, 1, 8), (1, 2, 4, 1), (1, 1, 1, 1)])
def test_a_row_of_which_a_bias_hides_everything_is_left_out_beside_sinks(shape, hidden, backend):
    """The mean is that over the rows for which a bias of other ranges, a mask and a window leave a key."""
    query, key = case(0, heads=1, groups=2, queries=4, keys=8)
    bias = randn(*shape, seed=3).masked_fill(randn(*shape, seed=4) > 0, hidden)
    limits = {"window": (2, 0), "key_mask": randn(2, 8, seed=5) > -0.5, "bias": bias}
    lse = mekernels.attention_lse(query, key, sinks=randn(2, seed=6), **limits)
    received = mekernels.attention_sums(query, key, lse, over="columns", **limits)
    with mekernels.use_backend(backend):
        found = mekernels.head_statistics(query, key, lse, sinks=slice(None), **limits)
    place = torch.arange(8) - torch.arange(4)[:, None] - 4
    shown = (place <= 0) & (place >= -2) & limits["key_mask"][:, None, None] & (bias > hidden / 2)
    seeing = shown.any(-1).expand(2, 2, 4).sum(-1)
    torch.testing.assert_close(found.sink, received.sum(-1) / seeing.clamp(min=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_read_as_each_by_itself(dtype):
    query, key = case(0, batch=1, queries=9)
    ends = torch.tensor([0, 4, 4, 9], dtype=dtype)  # the second of three sequences is empty
    packed, limits = {"cu_seqlens": ends}, {"causal": True, "window": (2, -1)}
    lse = mekernels.attention_lse(query, key, **packed, **limits)
    found = [
        attention_columns(query, key, lse, slice(None), reduce="none", **packed, **limits),
        mekernels.attention_sums(query, key, lse, over="rows", rows=slice(2, 8), **packed, **limits),
        mekernels.head_statistics(query, key, lse, rows=slice(5, 9), **packed, **limits).entropy,
    ]
    wide = torch.zeros(6, 9, 9, dtype=query.dtype)
    for part in (slice(0, 4), slice(4, 9)):
        wide[:, part, part] = reference.attention_map(query[:, :, part], key[:, :, part], **limits)[0]
    entropy = -torch.xlogy(wide, wide).sum(-1)[:, 5:9].mean(-1)
    for one, expected in zip(found, (wide, wide[:, 2:8].sum(1), entropy), strict=True):
        assert_exact(one[0], expected)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 9"):
        mekernels.head_statistics(query, key, lse, cu_seqlens=torch.tensor([0, 8]))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_sink_that_is_given_twice_counts_once(backend):
    query, key = case()
    lse, once = logsumexp(query, key), torch.tensor([[3, 8, -1], [0, 5, 6]])
    with mekernels.use_backend(backend):
        expected = mekernels.head_statistics(query, key, lse, sinks=once)
        found = mekernels.head_statistics(query, key, lse, sinks=once[:, [2, 1, 0, 1, 1, 0]])
        assert_exact(found.sink[0], expected.sink[0])
        assert_exact(found.sink[1], expected.sink[1])


def test_head_statistics_have_no_gradient():
    query, key = (item.requires_grad_() for item in case())
    found = mekernels.head_statistics(query, key, logsumexp(query, key))
    assert not any(item.requires_grad for item in found[:3])
    with pytest.raises(ValueError, match=r"lse must have shape"):
        mekernels.head_statistics(query, key, torch.zeros(2, 6, 8, dtype=torch.float64))
    for wrong, message in (
        ({"video": slice(0, 4)}, "period must be given with video or diagonal_width"),
        ({"diagonal_width": 1}, "period must be given with video or diagonal_width"),
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"period": 2, "diagonal_width": -1}, "diagonal_width must be at least 0, got -1"),
        ({"period": 2, "video": slice(0, 8, 2)}, "video must be a slice of step 1"),
    ):
        with pytest.raises(ValueError, match=message):
            mekernels.head_statistics(query, key, logsumexp(query, key), **wrong)
    with pytest.raises(TypeError, match=r"sinks must be a slice or an int64 torch\.Tensor, got int"):
        mekernels.head_statistics(query, key, logsumexp(query, key), sinks=0)
    with pytest.raises(ValueError, match=r"sinks must lie between -1 \(padding\) and 8, got 9"):
        mekernels.head_statistics(query, key, logsumexp(query, key), sinks=torch.tensor([[9], [0]]))


@pytest.mark.parametrize("causal", [False, True])
def test_with_the_logsumexp_of_flash_attention_the_gradient_is_that_of_the_softmax(causal):
    query, key = (item.requires_grad_() for item in case(queries=9))
    _, lse = flash_attention(query, key, key, causal=causal)
    columns = torch.tensor([[2, 8], [0, -1]])
    read = attention_columns(query, key, lse, columns, causal=causal)
    whole = reference.attention_map(query, key, causal=causal).mean(1)
    expected = torch.stack(
        [item[:, column.clamp(min=0)] for item, column in zip(whole, columns, strict=True)]
    )
    expected = expected * (columns >= 0)[:, None]
    assert_exact(read, expected)
    weights = randn(*read.shape, seed=5)
    wanted = torch.autograd.grad(expected, (query, key), weights)
    for one, other in zip(torch.autograd.grad(read, (query, key), weights), wanted, strict=True):
        assert_exact(one, other, 1e-11)
