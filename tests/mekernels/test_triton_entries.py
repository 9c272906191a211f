"""The Triton kernels that read entries against float64, in triton's interpreter or on a GPU.

Without either, ``test_triton_interpreter.py`` runs this file in a process of its own.
"""

import math

import nonfinite
import pytest
import torch
from kernel_support import assert_error_rule, randn, strided
from test_attention_entries import (
    assert_same_statistics,
    entry_nonfinite,
    logsumexp,
    masked_nan,
    of_window,
    ranges,
    row_hidden_by_bias,
)
from test_attention_rows import additive, pick

import mekernels
from mekernels import attention_columns, attention_sums, reference
from mekernels import launch as common

DEVICE = "cpu" if common.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if common.interpreted() else [torch.bfloat16])

pytestmark = [
    pytest.mark.skipif(bool(common.machine()), reason="; ".join(common.machine())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def inputs(seed, batch, heads, groups, queries, keys, width, dtype, masked=False, causal=False):
    query = strided(randn(batch, heads * groups, queries, width, seed=seed, dtype=dtype))
    key = strided(randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype))
    options = {"causal": causal, "key_mask": randn(batch, keys, seed=seed) > -1 if masked else None}
    return (query, key, logsumexp(query, key, **options)), options


def run(function, tensors, *arguments, device="cpu", dtype=None, **options):
    """Values and gradients under fixed random weights; values alone where there are no gradients."""
    wide = options.get("reduce") != "max"
    tensors = [item.to(device, dtype or item.dtype).detach().requires_grad_(wide) for item in tensors]
    arguments = [item.to(device) if isinstance(item, torch.Tensor) else item for item in arguments]
    options = {k: item.to(device) if isinstance(item, torch.Tensor) else item for k, item in options.items()}
    result = function(*tensors, *arguments, **options)
    weights = randn(*result.shape, seed=7).to(result)
    gradients = torch.autograd.grad(result, tensors, weights, materialize_grads=True) if wide else ()
    return [item.detach().cpu() for item in (result, *gradients)]


def compare(name, tensors, *arguments, **options):
    """The error rule for values and gradients, and the same bits twice."""
    ours, plainly = getattr(mekernels, name), getattr(reference, name)
    with mekernels.use_backend("triton"):
        actual = run(ours, tensors, *arguments, device=DEVICE, **options)
        again = run(ours, tensors, *arguments, device=DEVICE, **options)
    exact = run(plainly, tensors, *arguments, dtype=torch.float64, **options)
    plain = run(plainly, tensors, *arguments, **options)
    assert actual[0].dtype == torch.float32
    assert [item.dtype for item in actual[1:]] == [item.dtype for item in tensors[: len(actual) - 1]]
    for place, (one, two, wanted, rough) in enumerate(zip(actual, again, exact, plain, strict=True)):
        assert torch.equal(one, two)
        assert_error_rule(one, wanted, rough, factor=3.0 if place else 2.0)
    return actual


# batch, heads, groups, queries, keys, width, columns, causal, masked, reduce
COLUMNS = [
    (1, 1, 1, 1, 1, 16, slice(None), False, False, "mean"),
    (2, 1, 2, 70, 80, 40, slice(3, 70), True, True, "mean"),
    (1, 1, 2, 70, 41, 80, 37, True, False, "none"),
    (1, 2, 1, 20, 30, 256, 5, False, True, "mean"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(len(COLUMNS)))
def test_columns(number, dtype):
    *shape, columns, causal, masked, reduce = COLUMNS[number]
    tensors, options = inputs(10 * number, *shape, dtype, masked, causal)
    column = columns if isinstance(columns, slice) else pick(shape[0], columns, shape[4], number)
    compare("attention_columns", tensors, column, reduce=reduce, **options)


# batch, heads, groups, queries, keys, width, over, reduce, rows, columns, causal, masked
SUMS = [
    (1, 1, 1, 1, 1, 16, "rows", "sum", None, None, False, False),
    (1, 1, 3, 70, 75, 24, "rows", "mean", slice(2, 69), slice(1, 70), True, False),
    (1, 2, 2, 50, 40, 80, "rows", "sum", None, None, True, True),
    (2, 1, 1, 70, 75, 96, "columns", "sum", slice(3, 70), slice(5, 72), True, False),
    (1, 1, 2, 33, 75, 256, "columns", "mean", None, slice(5, 72), True, True),
    # The last key that the rows of a block see is the first of a block of keys.
    (1, 1, 1, 70, 71, 16, "columns", "sum", None, None, True, False),
    (1, 1, 2, 70, 75, 24, "rows", "max", None, None, True, True),
    (1, 1, 2, 70, 75, 24, "columns", "max", None, None, True, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(len(SUMS)))
def test_sums(number, dtype):
    *shape, over, reduce, rows, columns, causal, masked = SUMS[number]
    tensors, options = inputs(10 * number, *shape, dtype, masked, causal)
    window = {"over": over, "reduce": reduce, "rows": rows, "columns": columns}
    compare("attention_sums", tensors, **window, **options)


LIMITS = [
    {},
    # The last row that sees the keys of a block is the first of a block of rows.
    {"window": (1, -1), "softcap": 30.0, "bias": "of a head"},
    {"causal": True, "window": (20, -1), "softcap": 0.5, "bias": "of all"},
    {"window": (3, 17), "bias": "of a key"},
    {"window": (-1, 0), "softcap": 2.0},
    {"key_range": True, "causal": True},
    {"key_range": True, "fold": 2, "bias": "of all", "window": (20, 17)},
]


def limited(number):
    """Query, key and logsumexp with the limits of that number, of one dtype, and options of the whole map."""
    dtype, queries = DTYPES[number % len(DTYPES)], 70
    options = dict(LIMITS[number])
    fold = options.get("fold", 1)
    keys = 75 if fold == 1 else 40 * fold
    (query, key, _), _ = inputs(number, 2, 1, 2, queries, keys, 24, dtype)
    if "bias" in options:
        options["bias"] = additive(options["bias"], 2, 2, queries, keys, number, dtype)
    if "key_range" in options:
        options["key_range"] = ranges(2, queries, keys // fold, number)
    return (query, key, logsumexp(query, key, **options)), options


@pytest.mark.parametrize("number", range(1, len(LIMITS)))
@pytest.mark.parametrize("call", ["columns", "chosen columns", "over rows", "over columns"])
def test_windows_caps_and_biases(number, call):
    tensors, options = limited(number)
    if call == "over rows":
        columns = slice(5, 72)
        compare("attention_sums", tensors, over="rows", columns=columns, **of_window(options, None, columns))
    elif call == "over columns":
        rows = slice(3, 69)
        compare("attention_sums", tensors, over="columns", rows=rows, **of_window(options, rows, None))
    else:
        columns = slice(3, 70) if call == "columns" else pick(2, 9, 40, number)
        compare("attention_columns", tensors, columns, reduce="none", **of_window(options, None, columns))


@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_logsumexp_and_its_gradient(number):
    (query, key, lse), options = limited(number)
    found, seen = [], lse != -math.inf
    for backend, kind in (("triton", query.dtype), ("reference", torch.float64), ("reference", query.dtype)):
        on = DEVICE if backend == "triton" else "cpu"
        pair = [item.to(on, kind).detach().requires_grad_() for item in (query, key)]
        if backend == "triton":
            moved = {k: v.to(on) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            with mekernels.use_backend("triton"):
                read = mekernels.attention_lse(*pair, **moved)
        else:
            read = reference.attention_lse(*pair, **options)
        above = randn(*read.shape, seed=5).masked_fill(~seen, 0).to(read)
        grads = (item.nan_to_num(nan=0) for item in torch.autograd.grad(read, pair, above))
        found.append([item.detach().cpu() for item in (read, *grads)])
        found[-1][0] = found[-1][0][seen]
    for place, (one, exact, plain) in enumerate(zip(*found, strict=True)):
        assert_error_rule(one, exact, plain, factor=3.0 if place else 2.0)


@pytest.mark.parametrize("value", nonfinite.VALUES)
@pytest.mark.parametrize("where", ["query", "key", "hidden key", "lse"])
@pytest.mark.parametrize("call", ["columns", "over rows", "over columns", "largest"])
def test_input_that_is_not_finite_reaches_what_depends_on_it(value, where, call):
    entry_nonfinite(value, where, call, "triton", DEVICE)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_a_row_of_which_a_bias_hides_everything_is_zero(hidden):
    row_hidden_by_bias(hidden, "triton", DEVICE)


@pytest.mark.parametrize("over", ["rows", "columns"])
def test_a_masked_key_that_is_no_number_stays_out_of_gradients(over):
    masked_nan(over, "triton", DEVICE)


DIAGONALS = {"video": slice(3, 72), "period": 7, "diagonal_width": 1}


@pytest.mark.parametrize("number", range(1, len(LIMITS)))
@pytest.mark.parametrize("sinks", [slice(0, 3), torch.tensor([[0, 3, -1], [7, 7, 1]])])
def test_head_statistics_with_limits(number, sinks):
    tensors, options = limited(number)
    options = of_window(options, slice(2, 69), None)
    with mekernels.use_backend("triton"):
        assert_same_statistics(
            *tensors, tolerance=1e-5, device=DEVICE, sinks=sinks, rows=slice(2, 69), **options, **DIAGONALS
        )


@pytest.mark.parametrize("call", ["attention_columns", "over rows", "over columns"])
def test_one_query_and_many_cached_keys(call):
    tensors, options = inputs(5, 2, 2, 3, 1, 150, 32, torch.float32, causal=True)
    if call == "attention_columns":
        compare(call, tensors, slice(0, 150), **options)
    else:
        compare("attention_sums", tensors, over=call[5:], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, True)])
def test_head_statistics(dtype, causal, masked):
    tensors, options = inputs(3, 1, 1, 2, 70, 75, 24, dtype, masked, causal)
    chosen = {"sinks": torch.tensor([[0, 3, -1]]), "rows": slice(2, 69)}
    with mekernels.use_backend("triton"):
        # A logsumexp of this size is rounded; the weights, and so the entropies, have its error.
        assert_same_statistics(*tensors, tolerance=1e-5, device=DEVICE, **chosen, **options)


def test_padding_ignores_what_flows_back_to_it():
    tensors, _ = inputs(0, 1, 1, 2, 9, 20, 16, torch.float32)
    tensors = [item.to(DEVICE).requires_grad_() for item in tensors]
    with mekernels.use_backend("triton"):
        result = attention_columns(*tensors, torch.tensor([[0, -1]], device=DEVICE))
    above = torch.ones_like(result)
    above[:, :, 1] = math.nan
    for gradient in torch.autograd.grad(result, tensors, above):
        assert gradient.isfinite().all()


def test_small_gradients_survive_half_precision():
    """Each entry is 1.5 times the smallest number of float16, which would round it by a third."""
    query, key = (torch.full((1, 1, 64, 16), fill, dtype=torch.float16) for fill in (0.0, 1.0))
    lse = torch.full((1, 1, 64), -math.log(1.5 * 2.0**-24))
    for over, place in (("columns", 0), ("rows", 1)):
        pair = (query, key) if place == 0 else (key, query)
        tensors = [item.to(DEVICE).requires_grad_() for item in (*pair, lse)]
        with mekernels.use_backend("triton"):
            result = attention_sums(*tensors, over=over, softmax_scale=16.0)
        found = torch.autograd.grad(result.sum(), tensors)[place]
        torch.testing.assert_close(
            found.float(), torch.full_like(found.float(), 1536 * 2.0**-24), rtol=1e-3, atol=0
        )


def test_memory_that_is_read_beyond_the_tokens_does_not_count():
    (query, key, lse), _ = inputs(3, 1, 1, 2, 20, 30, 24, torch.float16)
    padded = torch.full((1, 1, 70, 40), math.nan, dtype=torch.float16)
    padded[:, :, 11:41, 5:29] = key
    for over in ("rows", "columns"):
        with mekernels.use_backend("triton"):
            wanted = run(attention_sums, (query, key, lse), device=DEVICE, over=over)
            found = run(attention_sums, (query, padded[:, :, 11:41, 5:29], lse), device=DEVICE, over=over)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


def test_operator_checks():
    tensors, _ = inputs(3, 1, 2, 2, 9, 20, 16, torch.float32)
    tensors = [item.to(DEVICE).requires_grad_() for item in tensors]
    ops, rest = torch.ops.mekernels, (None, None, None, 0, 11, 0.3, 5, 0, 2.0)
    torch.library.opcheck(ops.attention_columns_triton.default, (*tensors, *rest, True))
    torch.library.opcheck(ops.attention_sums_triton.default, (*tensors, *rest, True, False))


def test_what_it_cannot_run_is_refused():
    tensors, _ = inputs(3, 1, 2, 2, 9, 20, 16, torch.float64)
    with mekernels.use_backend("triton"), pytest.raises(mekernels.BackendError, match=r"got torch\.float64"):
        attention_sums(*(item.to(DEVICE) for item in tensors), over="rows")
