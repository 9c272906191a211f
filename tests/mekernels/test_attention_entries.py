"""``attention_columns`` and ``attention_sums`` against the reference, on the backends that run on a CPU."""

import math

import nonfinite
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import FLOATS, assert_error_rule, assert_exact, randn, strided
from test_attention_rows import additive, pick

import mekernels
from mekernels import BackendError, attention_columns, attention_sums, flash_attention, reference
from mekernels.attention_entries import composite

VIDEO = mekernels.VideoTokens(frames=2, height=2, width=2)


def case(seed=0, batch=2, heads=2, groups=3, queries=7, keys=9, width=5, dtype=torch.float64, scale=1.0):
    query = randn(batch, heads * groups, queries, width, seed=seed, dtype=dtype, scale=scale)
    key = randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype, scale=scale)
    return strided(query), strided(key)


def assert_same_statistics(query, key, lse, tolerance=1e-12, device="cpu", **options):
    """Compare the statistics of the current backend with the reference."""
    wide = [item.double() for item in (query, key, lse)]
    with mekernels.use_backend("reference"):
        expected = mekernels.head_statistics(*wide, **options)
    moved = {k: item.to(device) if isinstance(item, torch.Tensor) else item for k, item in options.items()}
    found = mekernels.head_statistics(*(item.to(device) for item in (query, key, lse)), **moved)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            assert_exact(one.cpu().double(), other, tolerance)


def logsumexp(query, key, **options):
    found = reference.attention_lse(query.double(), key.double(), **options)
    return found.to(mekernels.checks.accumulate_dtype(query.dtype))


def graded(function, inputs, *arguments, **options):
    """Values and gradients under fixed random weights."""
    inputs = [item.detach().clone().requires_grad_() for item in inputs]
    result = function(*inputs, *arguments, **options)
    weights = randn(*result.shape, seed=7).to(result)
    return result.detach(), *torch.autograd.grad(result, inputs, weights, materialize_grads=True)


def compare(functions, inputs, *arguments, **options):
    actual, expected = (graded(function, inputs, *arguments, **options) for function in functions)
    for one, other in zip(actual, expected, strict=True):
        assert_exact(one, other, 1e-11)


SHAPES = {
    "seed": st.integers(0, 99),
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "queries": st.integers(1, 9),
    "keys": st.integers(1, 9),
    "width": st.integers(1, 9),
    "causal": st.booleans(),
    "masked": st.booleans(),
    "window": st.sampled_from([None, None, (0, 0), (2, -1), (-1, 1), (3, 2)]),
    "softcap": st.sampled_from([None, None, 0.7, 30.0]),
    "bias": st.sampled_from([None, None, "of a key", "of a head", "of all"]),
    "ranged": st.booleans(),
    "fold": st.sampled_from([1, 1, 2, 3]),
    "chunk": st.sampled_from([1, 40, 1 << 20]),
}


def ranges(batch, rows, keys, seed):
    """(B, R, 2) key ranges, some of them empty or beyond the keys."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-2, keys, (batch, rows), generator=generator)
    length = torch.randint(-1, keys + 3, (batch, rows), generator=generator)
    # Any number of 64 bits is a bound.
    first[:, 0], length[:, 0] = -(2**40), 2**41
    return torch.stack([first, first + length], -1)


def limited(query, key, seed, causal, masked, window, softcap, bias, ranged=False, fold=1):
    """Options of the whole map with the given limits, and its logsumexp."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    options = {"causal": causal, "window": window, "softcap": softcap, "softmax_scale": 0.3, "fold": fold}
    options["key_range"] = ranges(batch, queries, keys // fold, seed) if ranged else None
    options["key_mask"] = randn(batch, keys, seed=seed) > 0 if masked else None
    options["bias"] = additive(bias, batch, heads, queries, keys, seed) if bias else None
    return options, logsumexp(query, key, **options)


def of_window(options, rows, columns):
    """The same with the bias of some rows and columns, each a slice or (B, C) positions."""
    bias, key_range, fold = options.get("bias"), options.get("key_range"), options.get("fold", 1)
    if key_range is not None:
        options = options | {"key_range": key_range[:, rows or slice(None)]}
    if bias is None:
        return options
    bias = bias if bias.shape[2] == 1 else bias[:, :, rows or slice(None)]
    parts = bias.chunk(fold, -1)
    if isinstance(columns, torch.Tensor):
        picked = (reference.picked_columns(part.expand(len(columns), -1, -1, -1), columns) for part in parts)
    else:
        picked = (part[..., columns or slice(None)] for part in parts)
    return options | {"bias": torch.cat(list(picked), -1)}


@settings(max_examples=100)
@given(
    **SHAPES,
    columns=st.one_of(st.integers(0, 4), st.slices(9)),
    reduce=st.sampled_from(["mean", "none"]),
)
def test_columns_against_the_reference(
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
    columns,
    reduce,
):
    query, key = case(seed, batch, heads, groups, queries, fold * keys, width)
    column = columns if isinstance(columns, slice) else pick(batch, columns, keys, seed)
    if isinstance(column, slice) and (column.step or 1) < 0:
        # torch has no negative steps, so the reference cannot be asked.
        column = slice(column.start, column.stop)
    options, lse = limited(query, key, seed, causal, masked, window, softcap, bias, ranged, fold)
    options = of_window(options, None, column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "CHUNK_ELEMENTS", chunk)
        compare(
            (attention_columns, reference.attention_columns),
            (query, key, lse),
            column,
            reduce=reduce,
            **options,
        )


@settings(max_examples=100)
@given(
    **SHAPES,
    over=st.sampled_from(["rows", "columns"]),
    reduce=st.sampled_from(["sum", "mean", "max"]),
    rows=st.sampled_from([None, slice(2, 6), slice(-3, None), slice(4, 2)]),
    columns=st.sampled_from([None, slice(1, 5), slice(-2, None)]),
)
def test_sums_against_the_reference(
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
    over,
    reduce,
    rows,
    columns,
):
    fold = 1 if reduce == "max" else fold
    query, key = case(seed, batch, heads, groups, queries, fold * keys, width)
    limits, lse = limited(query, key, seed, causal, masked, window, softcap, bias, ranged, fold)
    limits = of_window(limits, rows, columns)
    options = {"over": over, "reduce": reduce, "rows": rows, "columns": columns, **limits}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "CHUNK_ELEMENTS", chunk)
        if reduce == "max":
            expected = reference.attention_sums(query, key, lse, **options)
            assert_exact(attention_sums(query, key, lse, **options), expected)
        else:
            compare((attention_sums, reference.attention_sums), (query, key, lse), **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("call", ["columns", "over rows", "over columns"])
def test_error_rule(dtype, seed, call):
    query, key = case(seed, queries=43, keys=66, width=24, dtype=dtype, scale=1.5)
    lse = logsumexp(query, key, causal=True)
    if call == "columns":
        functions, arguments = (attention_columns, reference.attention_columns), (pick(2, 13, 66, seed),)
        options = {"reduce": "none", "causal": True}
    else:
        functions, arguments = (attention_sums, reference.attention_sums), ()
        options = {"over": call[5:], "columns": slice(3, 50), "causal": True}
    wide = [item.double() for item in (query, key, lse)]
    actual = graded(functions[0], (query, key, lse), *arguments, **options)
    exact = graded(functions[1], wide, *arguments, **options)
    plain = graded(functions[1], (query, key, lse), *arguments, **options)
    assert [item.dtype for item in actual] == [torch.float32, dtype, dtype, torch.float32]
    for place, (one, wanted, rough) in enumerate(zip(actual, exact, plain, strict=True)):
        assert_error_rule(one, wanted, rough, factor=3.0 if place else 2.0)


def test_gradcheck():
    query, key = case(queries=4, keys=6, width=3)
    options = {"causal": True, "key_mask": randn(2, 6) > -1, "softcap": 0.8, "window": (4, -1)}
    lse = logsumexp(query, key, **options)
    # A row that sees nothing has no logsumexp to vary.
    lse = lse.masked_fill(lse == -math.inf, 0)
    inputs = [item.detach().requires_grad_() for item in (query, key, lse)]
    columns = torch.tensor([[1, 1, 0, -1], [3, -1, 2, 5]])
    for reduce in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *t, reduce=reduce: attention_columns(*t, columns, reduce=reduce, **options), inputs
        )
    for over in ("rows", "columns"):
        assert torch.autograd.gradcheck(
            lambda *t, over=over: attention_sums(*t, over=over, reduce="mean", rows=slice(1, 4), **options),
            inputs,
        )


def test_all_the_attention_of_a_row_sums_to_one():
    query, key = case()
    _, lse = flash_attention(query, key, key)
    assert_exact(attention_sums(query, key, lse, over="columns"), torch.ones(2, 6, 7, dtype=torch.float64))


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    query, key = case(queries=9, keys=4)
    lse = logsumexp(query, key, causal=True)
    assert (lse[:, :, :5] == -math.inf).all()
    for function, options in (
        (attention_columns, {"columns": slice(None)}),
        (attention_sums, {"over": "columns"}),
        (attention_sums, {"over": "rows"}),
    ):
        value, grad_query, grad_key, grad_lse = graded(
            lambda *t, function=function, options=options: function(*t, causal=True, **options),
            (query, key, lse),
        )
        assert (grad_query[:, :, :5] == 0).all()
        assert (grad_lse[:, :, :5] == 0).all()
        assert value.isfinite().all()
        assert grad_key.isfinite().all()


@pytest.mark.parametrize("queries", [0, 3])
def test_no_keys_and_no_rows(queries):
    query, key = case(queries=queries, keys=0)
    lse = torch.full((2, 6, queries), -math.inf, dtype=torch.float64)
    assert attention_sums(query, key, lse, over="rows").shape == (2, 6, 0)
    assert (attention_sums(query, key, lse, over="columns", reduce="mean") == 0).all()
    padding = torch.full((2, 3), -1)
    assert (attention_columns(query, key, lse, padding) == 0).all()
    assert attention_columns(query, key, lse, padding).shape == (2, queries, 3)
    assert attention_columns(query, key, lse, slice(None), reduce="none").shape == (2, 6, queries, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda query, lse: mekernels.attention_rows(query, query, torch.zeros(1, 1).long(), slice(None)),
        lambda query, lse: mekernels.attention_lse(query, query),
        lambda query, lse: attention_columns(query, query, lse, slice(None)),
        lambda query, lse: attention_sums(query, query, lse, over="rows"),
        lambda query, lse: mekernels.head_statistics(query, query, lse),
        lambda query, lse: mekernels.diagonal_attention(query, query, lse, VIDEO),
        lambda query, lse: mekernels.MotionStatistics(VIDEO, 2).update(query, query, lse),
        lambda query, lse: flash_attention(query, query, query),
    ],
)
def test_queries_without_a_width_or_a_head_are_refused(call):
    """Their scale is 1 / √0, and the mean over their heads 0 / 0."""
    for heads, width, message in ((2, 0, "a width of at least 1, got 0"), (0, 4, "at least 1 head, got 0")):
        with pytest.raises(ValueError, match=f"query must have {message}"):
            call(torch.zeros(1, heads, 8, width), torch.zeros(1, heads, 8))


def test_padding_ignores_what_flows_back_to_it():
    query, key = (item.requires_grad_() for item in case())
    lse = logsumexp(query, key).detach().requires_grad_()
    result = attention_columns(query, key, lse, torch.tensor([[0, -1], [1, 2]]))
    above = torch.ones_like(result)
    above[0, :, 1] = math.nan
    for gradient in torch.autograd.grad(result, (query, key, lse), above):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("where", ["query", "key", "hidden key", "lse"])
@pytest.mark.parametrize("call", ["columns", "over rows", "over columns", "largest"])
def test_input_that_is_not_finite_reaches_what_depends_on_it(value, where, call):
    entry_nonfinite(value, where, call, "torch", "cpu")


def entry_nonfinite(value, where, call, backend, device):
    """NaN and infinity are where the reference has them, and other values are the same."""
    query, key = randn(1, 4, 9, 16, dtype=torch.float32), randn(1, 2, 9, 16, seed=1, dtype=torch.float32)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    lse = logsumexp(query, key, causal=True, key_mask=mask)
    if where == "lse":
        lse[0, 1, 5] = value
    else:
        target, place = (query, 5) if where == "query" else (key, 4 if where == "hidden key" else 3)
        target[0, 1, place, 2] = value
    options = {"causal": True, "key_mask": mask}
    found = []
    for name in (backend, "reference"):
        inputs = [item.to(device) for item in (query, key, lse)]
        moved = options | {"key_mask": mask.to(device)}
        with mekernels.use_backend(name):
            if call == "columns":
                found.append(attention_columns(*inputs, slice(2, 9), reduce="none", **moved))
            elif call == "largest":
                found.append(attention_sums(*inputs, over="rows", reduce="max", **moved))
            else:
                found.append(attention_sums(*inputs, over=call[5:], **moved))
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-4, atol=1e-5)
    changed = not found[0].isfinite().all()
    if where == "hidden key":
        assert not changed
    elif math.isnan(value):
        assert changed


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_a_row_of_which_a_bias_hides_everything_is_zero(hidden):
    row_hidden_by_bias(hidden, "torch", "cpu")


def row_hidden_by_bias(hidden, backend, device):
    query, key = (randn(1, 2, 9, 16, seed=seed, dtype=torch.float32).to(device) for seed in (0, 1))
    bias = torch.zeros(1, 1, 9, 9, device=device)
    bias[:, :, 4] = hidden
    inputs = [item.requires_grad_() for item in (query, key)]
    with mekernels.use_backend(backend):
        lse = mekernels.attention_lse(*inputs, bias=bias)
        found = (
            attention_columns(*inputs, lse, slice(None), bias=bias),
            attention_sums(*inputs, lse, over="columns", bias=bias)[0].mT,
        )
        statistics = mekernels.head_statistics(*inputs, lse, bias=bias, period=2)
    assert (lse[:, :, 4] == -math.inf).all()
    assert lse[:, :, 5].isfinite().all()
    for read in found:
        assert (read.reshape(9, -1)[4] == 0).all()
        assert (read.reshape(9, -1)[5] > 0).all()
        for gradient in torch.autograd.grad(read.square().sum(), inputs, retain_graph=True):
            assert gradient.isfinite().all()
    assert all(item.isfinite().all() for item in statistics)


@pytest.mark.parametrize("over", ["rows", "columns"])
def test_a_masked_key_that_is_no_number_stays_out_of_gradients(over):
    masked_nan(over, "torch", "cpu")


def masked_nan(over, backend, device):
    query, key = (randn(1, 2, 9, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
    mask = torch.arange(9)[None] != 4
    lse = logsumexp(query, key, key_mask=mask)
    key[0, 1, 4, 2] = math.nan
    inputs = [item.to(device).requires_grad_() for item in (query, key, lse)]
    with mekernels.use_backend(backend):
        result = attention_sums(*inputs, over=over, key_mask=mask.to(device))
    for gradient in torch.autograd.grad(result.square().sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_meets_in_one_dtype(dtype):
    query, key = case(dtype=torch.float32)
    half = query.to(dtype)
    with torch.autocast("cpu", dtype):
        _, lse = flash_attention(half, key.to(dtype), key.to(dtype))
        assert attention_columns(half, key, lse, slice(0, 3)).shape == (2, 7, 3)


def sums_of(**change):
    query, key = case()
    arguments = {"query": query, "key": key, "lse": logsumexp(query, key), "over": "rows"}
    return attention_sums(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": torch.zeros(2, 6, 8, dtype=torch.float64)}, ValueError, r"lse must have shape \(2, 6, 7\)"),
        ({"lse": torch.zeros(2, 6, 7)}, TypeError, r"lse must have dtype torch\.float64"),
        ({"lse": None}, TypeError, r"lse must be a torch\.Tensor, got NoneType"),
        ({"over": "heads"}, ValueError, "over must be one of 'rows', 'columns', got 'heads'"),
        ({"reduce": "none"}, ValueError, "reduce must be one of 'sum', 'mean', 'max'"),
        ({"bias": torch.zeros(1, 1, 1, 9, requires_grad=True)}, ValueError, "bias has no gradient here"),
        ({"reduce": "max", "fold": 3}, ValueError, "fold must be 1 with reduce='max', got 3"),
        ({"fold": 2}, ValueError, r"fold must divide the number of keys \(9\), got 2"),
        ({"key_range": torch.zeros(2, 7)}, TypeError, r"key_range must have dtype torch\.int64"),
        (
            {"key_range": torch.zeros(2, 7, 2, dtype=torch.int64), "rows": slice(0, 3)},
            ValueError,
            r"key_range must have shape \(2, 3, 2\)",
        ),
        ({"rows": slice(0, 6, 2)}, ValueError, "rows must be a slice of step 1, got a step of 2"),
        ({"columns": [1]}, TypeError, "columns must be a slice or None, got list"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"key_mask": torch.ones(2, 9)}, TypeError, r"key_mask must be a bool torch\.Tensor"),
        ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(2, 9\)"),
    ],
)
def test_bad_arguments_of_sums(change, error, message):
    with pytest.raises(error, match=message):
        sums_of(**change)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (torch.tensor([[0, 9], [0, 0]]), ValueError, r"columns must lie between -1 \(padding\) and 8, got 9"),
        (torch.tensor([[0]]), ValueError, r"columns must have shape \(2, 1\)"),
        ([1, 2], TypeError, "columns must be a slice or an int64"),
    ],
)
def test_bad_columns(columns, error, message):
    query, key = case()
    for backend in ("torch", "reference"):
        with pytest.raises(error, match=message), mekernels.use_backend(backend):
            attention_columns(query, key, logsumexp(query, key), columns)


def test_the_largest_entry_has_no_gradient():
    query, key = case()
    lse = logsumexp(query, key)
    with pytest.raises(ValueError, match="reduce='max' has no gradient"):
        attention_sums(query.requires_grad_(), key, lse, over="rows", reduce="max")
    with torch.no_grad():
        assert attention_sums(query, key, lse, over="rows", reduce="max").shape == (2, 6, 9)


def test_it_is_differentiated_once():
    inputs = [item.requires_grad_() for item in case()]
    lse = logsumexp(*inputs).detach()
    (grad,) = torch.autograd.grad(
        attention_sums(*inputs, lse, over="rows").square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support torch\.func"):
        torch.func.grad(lambda query: attention_sums(query, inputs[1], lse, over="rows").sum())(inputs[0])


def test_a_backend_that_cannot_says_so():
    query, key = case()
    with mekernels.use_backend("native"), pytest.raises(BackendError, match="no such implementation"):
        attention_sums(query, key, logsumexp(query, key), over="rows")


def test_it_compiles_in_one_graph():
    def read(query, key):
        _, lse = flash_attention(query, key, key, causal=True, backend="torch")
        received = attention_sums(query, key, lse, over="rows", causal=True)
        return received.square().sum() + attention_columns(query, key, lse, slice(0, 3), causal=True).sum()

    inputs = [item.requires_grad_() for item in case()]
    actual = torch.compile(read, fullgraph=True, backend="aot_eager")(*inputs)
    expected = read(*inputs)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)
