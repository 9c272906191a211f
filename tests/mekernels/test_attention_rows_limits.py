"""Rows of attention with windows, soft caps, sinks and biases, of packed sequences and of cached keys."""

import itertools
import math

import pytest
import torch
from kernel_support import assert_error_rule, assert_exact, randn, strided
from test_attention_rows import additive, case

import mekernels
from mekernels import backends, reference
from mekernels.attention_rows import composite
from mekernels.attention_rows.call import Call


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 3}, TypeError, r"window must be two integers \(left, right\) or None, got 3"),
        ({"window": (1, 2.0)}, TypeError, "window must be two integers"),
        ({"window": (-2, 0)}, ValueError, r"window must hold -1 \(no limit\) or numbers of keys"),
        ({"window": (-1, 2**31)}, ValueError, r"numbers of keys below 2\*\*31, got \(-1, 2147483648\)"),
        ({"softcap": 0}, ValueError, "softcap must be finite and above 0, got 0; None for no cap"),
        ({"softcap": "50"}, TypeError, "softcap must be a float or None, got str"),
        ({"sinks": [0.0] * 6}, TypeError, r"sinks must be a torch\.Tensor, got list"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(6,\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have 4 dimensions \(batch, heads, rows, keys\)"),
        ({"bias": torch.zeros(1, 6, 7, 7)}, ValueError, r"bias must have shape \(2, 6, 1, 7\)"),
        ({"bias": torch.zeros(1, 1, 1, 7) > 0}, TypeError, "bias must have a floating-point dtype"),
        ({"cu_seqlens": [0, 7]}, TypeError, "cu_seqlens must be an int32 or int64 torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([[0, 7]])}, ValueError, r"cu_seqlens must have shape \(sequences"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens needs a batch of 1"),
    ],
)
def test_bad_windows_caps_and_biases(change, error, message):
    query, key = case()
    with pytest.raises(error, match=message):
        mekernels.attention_rows(query, key, torch.tensor([[0], [1]]), slice(None), **change)


def test_several_layers_with_a_soft_cap_and_sinks():
    query, key = (item.requires_grad_() for item in case(heads=1))
    sinks = [randn(3, seed=seed).requires_grad_() for seed in (8, 9)]
    rows, options = torch.tensor([[0, 3], [6, -1]]), {"causal": True, "softcap": 0.7}
    actual = composite.layer_attention_rows([query, query], [key, key], rows, sinks=sinks, **options)
    expected = sum(
        reference.attention_rows(query, key, rows, slice(None), sinks=item, **options) for item in sinks
    )
    assert_exact(actual, expected)
    weights = randn(*actual.shape, seed=3)
    inputs = (query, key, *sinks)
    wanted = torch.autograd.grad(expected, inputs, weights)
    for one, other in zip(torch.autograd.grad(actual, inputs, weights), wanted, strict=True):
        assert_exact(one, other, 1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (1, -1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_read_apart(causal, window, dtype):
    query, key = case(batch=1, queries=12, keys=12)
    ends = torch.tensor([0, 5, 5, 6, 12], dtype=dtype)  # the second sequence is empty
    rows, options = torch.tensor([[0, 4, 5, 6, 11, 9, -1]]), {"causal": causal, "window": window}
    packed = mekernels.attention_rows(query, key, rows, slice(None), cu_seqlens=ends, **options)
    expected = torch.zeros_like(packed)
    for place, row in enumerate(rows[0, :-1].tolist()):
        begin, end = next((a, b) for a, b in itertools.pairwise(ends) if a <= row < b)
        part = slice(begin, end)
        one = reference.attention_rows(
            *(query[:, :, part], key[:, :, part], torch.tensor([[row - begin]]), slice(None)), **options
        )
        expected[:, place, part] = one[:, 0]
    assert_exact(packed, expected)
    narrow = torch.tensor([[2, 9]]).expand(7, -1)[None]
    both = mekernels.attention_rows(
        query, key, rows, slice(None), cu_seqlens=ends, key_range=narrow, **options
    )
    assert (both[..., :2] == 0).all()
    assert (both[..., 9:] == 0).all()
    assert_exact(both.sum(-1)[0, [1, 2, 3]], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [[0, 5], [1, 12], [0, 8, 5, 12], [0]])
def test_packed_sequences_that_do_not_fit_are_refused(wrong):
    query, key = case(batch=1, queries=12, keys=12)
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to 12, the number of tokens, got"):
        mekernels.attention_rows(query, key, torch.tensor([[0]]), slice(None), cu_seqlens=torch.tensor(wrong))


@pytest.mark.parametrize("cached", [0, 1, 8])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_while_generating_are_those_of_the_whole(backend, cached):
    """Queries that continue cached keys, also a single one, see the same keys as in one pass over all."""
    query, key = case(queries=9, keys=9)
    query, key, sinks = strided(query), strided(key), randn(6, seed=3)
    rows = torch.arange(9).expand(2, -1)
    options = {"causal": True, "window": (4, -1), "sinks": sinks, "reduce": "none"}
    whole = reference.attention_rows(query, key, rows, slice(None), **options)
    new = 9 - cached
    with mekernels.use_backend(backend):
        found = mekernels.attention_rows(query[:, :, cached:], key, rows[:, :new], slice(None), **options)
    assert_exact(found, whole[:, :, cached:])


def test_a_learned_bias_is_read_where_no_gradient_is_wanted():
    query, key = case()
    rows, bias = torch.tensor([[0, 6], [3, -1]]), randn(1, 6, 2, 7)
    expected = mekernels.attention_rows(query, key, rows, slice(None), bias=bias)
    with torch.no_grad():
        found = mekernels.attention_rows(query, key, rows, slice(None), bias=bias.requires_grad_())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(2, 6, 2, 7), (1, 1, 1, 7), (2, 1, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_has_a_gradient_of_its_shape(shape, dtype):
    """Also beside hidden keys that are no numbers, and by the error rule in the bias's own dtype."""
    query, key = case(dtype=torch.float32)
    bias, rows = randn(*shape, dtype=dtype), torch.tensor([[0, 6], [3, -1]])
    if shape[3] > 1:
        key[:, :, 2], bias[..., 2] = math.nan, -math.inf
    found = []
    # Zero times NaN would be NaN in the reference.
    known = [item.nan_to_num(0) for item in (query, key)]
    for module, tensors, given in (
        (mekernels, (query, key), bias),
        (reference, [item.double() for item in known], bias.double()),
        (reference, known, bias.float()),
    ):
        given = given.requires_grad_()
        read = module.attention_rows(*tensors, rows, slice(1, 6), bias=given)
        found.append(torch.autograd.grad(read.square().sum(), given)[0])
    assert found[0].shape == shape
    assert found[0].dtype == dtype
    assert_error_rule(*found, factor=3.0)


def test_a_row_that_is_no_number_gives_a_hidden_key_no_gradient_of_a_bias():
    query, key = case()
    query[:, :, 6] = math.nan
    bias = torch.zeros(1, 6, 2, 7).index_fill_(3, torch.tensor([2]), -math.inf).requires_grad_()
    read = mekernels.attention_rows(query, key, torch.tensor([[0, 6], [3, -1]]), slice(None), bias=bias)
    (found,) = torch.autograd.grad(read.square().sum(), bias)
    assert (found[..., 2] == 0).all()
    assert found[:, :, 0].isfinite().all()
    assert found[:, :, 1, 3].isnan().all()


def test_kernels_that_run_the_forward_run_the_backward():
    """Also with the gradient of a bias: a call is refused before any work, not halfway."""
    query, key = case(dtype=torch.float32)
    bias = randn(1, 1, 1, 7, dtype=torch.float32).requires_grad_()
    call = Call(query, key, torch.tensor([[0, 6], [3, -1]]), None, None, None, 0, 5, 0.4, True, 1, True)
    for one in (call._replace(bias=bias), call._replace(query=query.double())):
        forward = backends.table("attention_rows")["triton"].reasons(one)
        assert (
            backends.table("attention_rows_backward")["triton"].reasons(query, query, query, one, True)
            == forward
        )


def test_keys_hidden_at_both_ends():
    query, key = case()
    rows, seen = torch.tensor([[0, 6], [3, -1]]), (torch.arange(7) > 1) & (torch.arange(7) < 5)
    bias = randn(1, 6, 2, 7).masked_fill(~seen, -math.inf)
    for options in ({"key_mask": seen.expand(2, -1)}, {"bias": bias}):
        expected = reference.attention_rows(query, key, rows, slice(None), **options)
        assert_exact(mekernels.attention_rows(query, key, rows, slice(None), **options), expected)


def test_no_rows_with_a_bias_of_each():
    query, key = case()
    none = torch.zeros(2, 0, dtype=torch.int64)
    for backend in ("auto", "reference"):
        with mekernels.use_backend(backend):
            found = mekernels.attention_rows(query, key, none, slice(None), bias=torch.zeros(1, 6, 0, 7))
        assert found.shape == (2, 0, 7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_of_no_query_are_named(backend):
    """A query without tokens refuses rows, also if all rows are padding."""
    query, key = torch.randn(1, 2, 0, 8), torch.randn(1, 1, 4, 8)
    refused = pytest.raises(ValueError, match="query must have tokens to read 2 rows, got 0")
    with mekernels.use_backend(backend), refused:
        mekernels.attention_rows(query, key, torch.tensor([[-1, -1]]), slice(0, 2))


def test_a_row_beyond_packed_sequences_is_named():
    query, key = case(batch=1)
    with pytest.raises(ValueError, match=r"rows must lie between -1 \(padding\) and 6, got 7"):
        mekernels.attention_rows(
            query, key, torch.tensor([[7]]), slice(None), cu_seqlens=torch.tensor([0, 3, 7])
        )


def test_a_bias_that_is_no_number_is_not_hidden():
    query, key = case()
    bias = torch.zeros(1, 1, 1, 7).index_fill_(3, torch.tensor([2]), math.nan)
    found = mekernels.attention_rows(query, key, torch.tensor([[0, 6], [3, -1]]), slice(None), bias=bias)
    assert found[0].isnan().all()
    assert (found[1, 1] == 0).all()


def test_key_ranges_under_the_operator_checks():
    query, key = (tensor.requires_grad_() for tensor in case())
    rows, limits = torch.tensor([[0, 6], [3, -1]]), torch.tensor([[[0, 4], [2, 7]], [[1, 3], [0, 0]]])
    settings = (rows, None, None, limits, 0, 5, 0.4, True, 1, False, 2.0)
    more = randn(6, seed=2).requires_grad_(), additive("of a head", 2, 6, 2, 7, 0).requires_grad_()
    torch.library.opcheck(torch.ops.mekernels.attention_rows.default, (query, key, *settings, *more))
