import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided

import mekernels
from mekernels import reference
from mekernels.attention_rows import composite


def case(seed=0, batch=2, heads=2, groups=3, queries=7, keys=7, width=5, dtype=torch.float64, scale=1.0):
    query = randn(batch, heads * groups, queries, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype, scale=scale)
    return query, key


def pick(batch, count, limit, seed):
    """Indices with repeats and padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, limit, (batch, count), generator=generator)


def additive(kind, batch, heads, rows, keys, seed, dtype=torch.float64):
    """A bias of a kind, which hides some keys in both ways there are."""
    size = {
        "of a key": (1, 1, 1, keys),
        "of a head": (1, heads, rows, keys),
        "of all": (batch, 1, rows, keys),
    }[kind]
    bias = randn(*size, seed=seed + 5, dtype=dtype)
    return bias.masked_fill(bias > 1.2, -math.inf).masked_fill(bias < -1.5, torch.finfo(dtype).min)


shapes = {
    "seed": st.integers(0, 99),
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "queries": st.integers(1, 9),
    "own": st.integers(1, 9),
    "width": st.integers(1, 9),
    "rows": st.integers(0, 4),
    "columns": st.one_of(st.integers(0, 4), st.slices(9)),
    "causal": st.booleans(),
    "masked": st.booleans(),
    "ranged": st.booleans(),
    "window": st.sampled_from([None, None, (0, 0), (2, -1), (-1, 1), (3, 2)]),
    "softcap": st.sampled_from([None, None, 0.7, 30.0]),
    "sunk": st.booleans(),
    "bias": st.sampled_from([None, "of a key", "of a head", "of all"]),
    "fold": st.integers(1, 3),
    "reduce": st.sampled_from(["mean", "none"]),
    "chunk": st.sampled_from([1, 40, 1 << 20]),
    "scale": st.sampled_from([1.0, 30.0]),
}


@settings(max_examples=100)
@given(**shapes)
def test_values_and_gradients_against_the_reference(
    seed,
    batch,
    heads,
    groups,
    queries,
    own,
    width,
    rows,
    columns,
    causal,
    masked,
    ranged,
    window,
    softcap,
    sunk,
    bias,
    fold,
    reduce,
    chunk,
    scale,
):
    query, key = case(seed, batch, heads, groups, queries, own * fold, width, scale=scale)
    query, key = strided(query).requires_grad_(), strided(key).requires_grad_()
    row = pick(batch, rows, queries, seed)
    column = columns if isinstance(columns, slice) else pick(batch, columns, own, seed + 1)
    if isinstance(column, slice) and (column.step or 1) < 0:
        # torch has no negative steps, so the reference cannot be asked.
        column = slice(column.start, column.stop)
    mask = randn(batch, own * fold, seed=seed) > 0 if masked else None
    limits = None
    if ranged:
        limits = torch.stack([pick(batch, rows, own, seed + 2), pick(batch, rows, own + 3, seed + 3)], -1)
    options = {"causal": causal, "key_mask": mask, "key_range": limits, "fold": fold, "reduce": reduce}
    options |= {"softmax_scale": 0.3, "window": window, "softcap": softcap}
    inputs = [query, key]
    if bias:
        options["bias"] = additive(bias, batch, heads * groups, rows, own * fold, seed).requires_grad_()
        inputs.append(options["bias"])
    if sunk:
        inputs.append(options.setdefault("sinks", randn(heads * groups, seed=seed + 4).requires_grad_()))
    expected = reference.attention_rows(query, key, row, column, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "CHUNK_ELEMENTS", chunk)
        actual = mekernels.attention_rows(query, key, row, column, **options)
        assert_exact(actual, expected)
        weights = randn(*expected.shape, seed=seed)
        gradients = torch.autograd.grad(actual, inputs, weights)
    wanted = torch.autograd.grad(expected, inputs, weights, materialize_grads=True)
    for one, other in zip(gradients, wanted, strict=True):
        assert_exact(one, other, 1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_rule(dtype, seed):
    query, key = case(seed, queries=33, keys=66, width=24, dtype=dtype, scale=1.5)
    rows, columns = pick(2, 9, 33, seed), pick(2, 13, 33, seed + 1)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key)]
    plain_inputs = [tensor.clone().requires_grad_() for tensor in (query, key)]
    exact_inputs = [tensor.double().requires_grad_() for tensor in (query, key)]
    results = []
    for function, pair in (
        (mekernels.attention_rows, inputs),
        (reference.attention_rows, exact_inputs),
        (reference.attention_rows, plain_inputs),
    ):
        result = function(*pair, rows, columns, causal=True, fold=2)
        weights = randn(*result.shape, seed=seed).to(result.dtype)
        results.append((result.detach(), *torch.autograd.grad(result, pair, weights)))
    actual, exact, plain = results
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == dtype
    assert_error_rule(actual[0], exact[0], plain[0])
    for index in (1, 2):
        assert_error_rule(actual[index], exact[index], plain[index], factor=3.0)


@pytest.mark.parametrize("columns", [slice(1, -6, 2), slice(5, 2, 3), slice(2, 5, -1)])
def test_a_slice_of_no_columns(columns):
    query, key = case()
    assert mekernels.attention_rows(query, key, torch.tensor([[0], [1]]), columns).shape == (2, 1, 0)


def test_gradcheck():
    query, key = (tensor.requires_grad_() for tensor in case(queries=4, keys=8, width=3))
    rows, columns = torch.tensor([[0, 3, 3], [2, -1, 1]]), torch.tensor([[1, 1, 0], [3, -1, 2]])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:6] = False
    options = {"causal": True, "key_mask": mask, "fold": 2, "softcap": 0.8}
    sinks, bias = randn(6, seed=3).requires_grad_(), randn(1, 6, 3, 8, seed=4).requires_grad_()
    for reduce in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda q, k, s, b, reduce=reduce: mekernels.attention_rows(
                q, k, rows, columns, sinks=s, bias=b, reduce=reduce, **options
            ),
            (query, key, sinks, bias),
        )


def test_double_use_accumulates():
    query, key = (tensor.requires_grad_() for tensor in case())
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 2], [-1, 4]])
    total = sum(
        mekernels.attention_rows(query, key, rows, slice(1, 5)).square().sum() for rows in (first, second)
    )
    total.backward()
    expected = sum(
        reference.attention_rows(query, key, rows, slice(1, 5)).square().sum() for rows in (first, second)
    )
    for actual, wanted in zip(
        (query.grad, key.grad), torch.autograd.grad(expected, (query, key)), strict=True
    ):
        assert_exact(actual, wanted)


def test_one_query_head_at_a_time_equals_grouped_heads():
    query, key = case(heads=2, groups=3)
    rows = torch.tensor([[0, 6], [3, -1]])
    grouped = mekernels.attention_rows(query, key, rows, slice(None), reduce="none")
    for head in range(6):
        single = mekernels.attention_rows(
            query[:, head : head + 1], key[:, head // 3, None], rows, slice(None)
        )
        assert_exact(grouped[:, head], single)


def test_a_row_without_any_allowed_key_is_zero_in_value_and_gradient():
    query, key = (tensor.requires_grad_() for tensor in case(queries=9, keys=4))
    rows = torch.tensor([[0, 8], [4, 5]])
    result = mekernels.attention_rows(query, key, rows, slice(None), causal=True)
    # The last query is aligned with the last key, so rows 0 to 4 of 9 see no key.
    assert (result[0, 0] == 0).all()
    assert (result[1, 0] == 0).all()
    assert_exact(result[1, 1], torch.eye(4, dtype=torch.float64)[0])
    result.sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()
    assert (query.grad[0, :, 0] == 0).all()


def test_padding_gives_zeros_and_no_gradient():
    query, key = (tensor.requires_grad_() for tensor in case())
    rows, columns = torch.full((2, 3), -1), torch.tensor([[0, -1], [1, 2]])
    result = mekernels.attention_rows(query, key, rows, columns)
    assert (result == 0).all()
    result.sum().backward()
    assert (query.grad == 0).all()
    assert (key.grad == 0).all()


def test_padded_rows_ignore_infinite_gradients():
    query, key = (tensor.requires_grad_() for tensor in case(batch=1))
    rows = torch.tensor([[1, -1]])
    result = mekernels.attention_rows(query, key, rows, torch.tensor([[0, -1]]))
    given = torch.full_like(result, math.nan)
    given[0, 0, 0] = 1.0
    for gradient in torch.autograd.grad(result, (query, key), given):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits(scale):
    query, key = case(scale=scale, dtype=torch.float32)
    rows = torch.arange(7).expand(2, -1)
    result = mekernels.attention_rows(query, key, rows, slice(None), reduce="none")
    exact = reference.attention_rows(query.double(), key.double(), rows, slice(None), reduce="none")
    assert_error_rule(result, exact, reference.attention_rows(query, key, rows, slice(None), reduce="none"))
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 6, 7))


def test_constant_rows_are_uniform():
    query, key = torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 10, 4)
    result = mekernels.attention_rows(query, key, torch.tensor([[0, 2]]), slice(None))
    torch.testing.assert_close(result, torch.full((1, 2, 10), 0.1))


def test_whole_rows_sum_to_one_and_equal_their_columns():
    query, key = case()
    rows = torch.tensor([[1, 6], [0, 3]])
    whole = mekernels.attention_rows(query, key, rows, slice(None))
    assert_exact(whole.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    columns = torch.tensor([[6, 0, 3], [2, 2, 5]])
    picked = mekernels.attention_rows(query, key, rows, columns)
    assert_exact(picked, whole.gather(2, columns[:, None].expand(-1, 2, -1)))


@pytest.mark.parametrize(
    "columns", [slice(None), slice(2, 5), slice(-3, None), slice(5, 2), slice(0, 7, 3), slice(None, None, -1)]
)
def test_slices_mean_what_python_means(columns):
    query, key = case()
    rows = torch.tensor([[1, 6], [0, 3]])
    index = torch.arange(7).tolist()[columns]
    expected = mekernels.attention_rows(query, key, rows, torch.tensor([index] * 2, dtype=torch.int64))
    assert_exact(mekernels.attention_rows(query, key, rows, columns), expected)


def test_identical_streams_fold_to_plain_attention():
    query, key = case()
    rows = torch.tensor([[1, 6], [0, 3]])
    for causal in (False, True):
        plain = mekernels.attention_rows(query, key, rows, slice(None), causal=causal)
        folded = mekernels.attention_rows(
            query, torch.cat([key, key], 2), rows, slice(None), causal=causal, fold=2
        )
        assert_exact(folded, plain)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_brings_query_and_key_together_and_rounds_nothing_else(backend):
    query, key = case(dtype=torch.float32)
    rows = torch.tensor([[1, 6], [0, 3]])
    with mekernels.use_backend(backend):
        expected = mekernels.attention_rows(query.bfloat16(), key.bfloat16(), rows, slice(None))
        full = mekernels.attention_rows(query, key, rows, slice(None))
        with torch.autocast("cpu", torch.bfloat16):
            result = mekernels.attention_rows(query.bfloat16(), key, rows, slice(None))
            assert torch.equal(mekernels.attention_rows(query, key, rows, slice(None)), full)
    assert torch.equal(result, expected)


def test_activation_checkpointing():
    query, key = (tensor.requires_grad_() for tensor in case())
    rows = torch.tensor([[1, 6], [0, 3]])

    def loss(query, key):
        return mekernels.attention_rows(query, key, rows, slice(1, 4)).square().sum()

    wanted = torch.autograd.grad(loss(query, key), (query, key))
    again = torch.utils.checkpoint.checkpoint(loss, query, key, use_reentrant=False)
    for actual, expected in zip(torch.autograd.grad(again, (query, key)), wanted, strict=True):
        assert_exact(actual, expected)


def test_no_keys_and_no_rows():
    query, key = case(keys=0)
    assert mekernels.attention_rows(query, key, torch.tensor([[0], [1]]), slice(None)).shape == (2, 1, 0)
    query, key = case()
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert mekernels.attention_rows(query, key, none, none).shape == (2, 0, 0)
    # Half precision adds rows that occur twice before it rounds.
    pair = [item.half().requires_grad_() for item in (query, key)]
    mekernels.attention_rows(*pair, none, slice(None)).sum().backward()
    assert all(item.grad is not None and (item.grad == 0).all() for item in pair)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": 3}, TypeError, "query must be a torch.Tensor, got int"),
        (
            {"query": torch.zeros(2, 6, 7)},
            ValueError,
            r"query must have 4 dimensions .* got shape \(2, 6, 7\)",
        ),
        ({"query": torch.zeros(2, 6, 7, 5, dtype=torch.int64)}, TypeError, "query must have a floating"),
        ({"key": torch.zeros(2, 2, 7, 5)}, TypeError, "key must have the dtype of query"),
        ({"key": torch.zeros(1, 2, 7, 5, dtype=torch.float64)}, ValueError, "key must have the batch size"),
        ({"key": torch.zeros(2, 4, 7, 5, dtype=torch.float64)}, ValueError, "divides the heads of query"),
        ({"key": torch.zeros(2, 0, 7, 5, dtype=torch.float64)}, ValueError, "divides the heads of query"),
        ({"key": torch.zeros(2, 2, 7, 4, dtype=torch.float64)}, ValueError, "key must have the width"),
        ({"rows": [[1], [2]]}, TypeError, "rows must be an int64 torch.Tensor, got list"),
        ({"rows": torch.zeros(2, 1)}, TypeError, "rows must have dtype torch.int64, got torch.float32"),
        ({"rows": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"rows must have shape \(2, 1\)"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, ValueError, "rows must have 2 dimensions"),
        (
            {"rows": torch.tensor([[7], [0]])},
            ValueError,
            r"rows must lie between -1 \(padding\) and 6, got 7",
        ),
        ({"rows": torch.tensor([[-2], [0]])}, ValueError, "rows must lie between .* got -2"),
        ({"columns": torch.tensor([[7], [0]])}, ValueError, "columns must lie between .* and 6, got 7"),
        ({"columns": [0]}, TypeError, "columns must be a slice or an int64 torch.Tensor, got list"),
        ({"columns": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"columns must have shape \(2, 2\)"),
        (
            {"query": torch.zeros(2, 4, 7, 0), "key": torch.zeros(2, 2, 7, 0)},
            ValueError,
            "query must have a width of at least 1, got 0",
        ),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float or None, got str"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite, got nan"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        (
            {"key_mask": torch.ones(2, 7)},
            TypeError,
            "key_mask must be a bool torch.Tensor, got torch.float32",
        ),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(2, 7\)"),
        ({"key_range": [[[0, 1]]]}, TypeError, "key_range must be an int64 torch.Tensor, got list"),
        (
            {"key_range": torch.zeros(2, 1, 3, dtype=torch.int64)},
            ValueError,
            r"key_range must have shape \(2, 1, 2\)",
        ),
        ({"fold": 2}, ValueError, r"fold must divide the number of keys \(7\), got 2"),
        ({"fold": 0}, ValueError, "fold must be at least 1, got 0"),
        ({"fold": 1.0}, TypeError, "fold must be an int, got float"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of 'mean', 'none', got 'sum'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(backend, change, error, message):
    query, key = case()
    arguments = {"query": query, "key": key, "rows": torch.zeros(2, 1, dtype=torch.int64)}
    arguments |= {"columns": slice(None)} | change
    with mekernels.use_backend(backend), pytest.raises(error, match=message):
        mekernels.attention_rows(**arguments)


def test_second_derivatives_are_refused():
    query, key = (tensor.requires_grad_() for tensor in case())
    result = mekernels.attention_rows(query, key, torch.tensor([[1], [0]]), slice(0, 3))
    (first,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_rows can be differentiated once, not twice"):
        first.sum().backward()


def test_functorch_is_refused():
    query, key = case()
    rows = torch.tensor([[1], [0]])
    with pytest.raises(RuntimeError, match=r"attention_rows does not support torch\.func"):
        torch.func.grad(lambda q: mekernels.attention_rows(q, key, rows, slice(None)).sum())(query)


def test_large_scores_keep_their_attention():
    # Float32 rounds a logsumexp near 4,000 by 2e-4. Attention computed from it would have this error.
    query = torch.full((1, 1, 1, 4), 32.0)
    key = torch.full((1, 1, 8, 4), 32.0)
    key[0, 0, 3:] -= 2.0**-7
    rows = torch.tensor([[0]])
    for scale in (0.5, 1.0):
        result, gradients = [], []
        for dtype in (torch.float32, torch.float64):
            pair = query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()
            result.append(mekernels.attention_rows(*pair, rows, slice(0, 4), softmax_scale=scale))
            gradients.append(torch.autograd.grad(result[-1][0, 0, 0] + 3 * result[-1][0, 0, 3], pair)[1])
        torch.testing.assert_close(result[0].double(), result[1], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_rows_are_added_before_they_are_rounded(dtype):
    query, key = (tensor.requires_grad_() for tensor in case(batch=1, dtype=dtype))
    rows = torch.zeros(1, 64, dtype=torch.int64)
    result = mekernels.attention_rows(query, key, rows, slice(0, 3))
    weights = randn(*result.shape).float()
    many = torch.autograd.grad(result, query, weights)[0]
    exact = query.detach().double().requires_grad_()
    wanted = torch.autograd.grad(
        reference.attention_rows(exact, key.detach().double(), rows, slice(0, 3)), exact, weights.double()
    )[0]
    assert (many.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


def test_gradients_keep_the_memory_order_of_their_inputs():
    query, key = (strided(tensor).requires_grad_() for tensor in case())
    result = mekernels.attention_rows(query, key, torch.tensor([[1], [0]]), slice(None))
    for one, other in zip(torch.autograd.grad(result.sum(), (query, key)), (query, key), strict=True):
        assert one.stride() == torch.empty_like(other).stride()
