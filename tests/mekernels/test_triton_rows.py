"""The Triton kernels of ``attention_rows`` against float64, in triton's interpreter or on a GPU.

Without either, ``test_triton_interpreter.py`` runs this file in a process of its own.
"""

import math

import pytest
import torch
from kernel_support import assert_error_rule, randn, strided
from test_attention_rows import additive, pick

import mekernels
from mekernels import backends, reference
from mekernels import launch as common

DEVICE = "cpu" if common.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if common.interpreted() else [torch.bfloat16])

pytestmark = pytest.mark.skipif(bool(common.machine()), reason="; ".join(common.machine()))


@pytest.fixture(autouse=True)
def wide_grid(monkeypatch):
    """As if the interpreter had a few multiprocessors, so that the keys are cut."""
    from mekernels.attention_rows import plan as attention_rows_plan

    original = attention_rows_plan.cuts
    monkeypatch.setattr(attention_rows_plan, "cuts", lambda call, programs, *rest: original(call, 1, *rest))


def inputs(
    seed, batch, heads, groups, queries, keys, width, rows, columns, dtype, own, ranged=False, scale=1.0
):
    query = strided(randn(batch, heads * groups, queries, width, seed=seed, dtype=dtype, scale=scale))
    key = strided(randn(batch, heads, keys, width, seed=seed + 1, dtype=dtype, scale=scale))
    row = pick(batch, rows, queries, seed)
    column = columns if isinstance(columns, slice) else pick(batch, columns, own, seed + 1)
    limits = None
    if ranged:
        limits = torch.stack([pick(batch, rows, own, seed + 2), pick(batch, rows, own + 9, seed + 3)], -1)
    return query, key, row, column, limits


def run(function, query, key, *arguments, dtype=None, device="cpu", **options):
    """Values and gradients under fixed random weights."""
    pair = [item.to(device, dtype or item.dtype).detach().requires_grad_() for item in (query, key)]
    arguments = [item.to(device) if isinstance(item, torch.Tensor) else item for item in arguments]
    options = {
        name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in options.items()
    }
    inputs = list(pair)
    for name in ("sinks", "bias"):
        if options.get(name) is not None:
            options[name] = options[name].detach().requires_grad_()
            inputs.append(options[name])
    result = function(*pair, *arguments, **options)
    weights = randn(*result.shape, seed=7).to(result)
    gradients = torch.autograd.grad(result, inputs, weights, materialize_grads=True)
    return [item.detach().cpu() for item in (result, *gradients)]


def compare(query, key, rows, columns, **options):
    """The error rule for values and gradients, and the same bits twice."""
    arguments = (query, key, rows, columns)
    with mekernels.use_backend("triton"):
        actual = run(mekernels.attention_rows, *arguments, device=DEVICE, **options)
        again = run(mekernels.attention_rows, *arguments, device=DEVICE, **options)
    exact = run(reference.attention_rows, *arguments, dtype=torch.float64, **options)
    plain = run(reference.attention_rows, *arguments, **options)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == query.dtype
    for place, (one, two, wanted, rough) in enumerate(zip(actual, again, exact, plain, strict=True)):
        assert torch.equal(one, two)
        assert_error_rule(one, wanted, rough, factor=3.0 if place else 2.0)
    return actual


# batch, heads, groups, queries, own keys, width, rows, columns, causal, masked, ranged, fold, reduce
CASES = [
    (1, 1, 1, 1, 1, 16, 1, slice(None), False, False, False, 1, "mean"),
    (2, 1, 3, 41, 41, 40, 7, slice(3, 30), True, True, False, 1, "mean"),
    (1, 1, 7, 33, 150, 80, 5, 9, True, False, True, 1, "mean"),
    (1, 1, 2, 90, 70, 32, 40, 75, True, True, False, 1, "none"),
    (2, 2, 1, 9, 37, 24, 4, slice(30, None), False, True, False, 2, "mean"),
    (1, 1, 2, 60, 45, 96, 6, 50, True, True, True, 2, "none"),
    (1, 1, 2, 12, 130, 128, 3, slice(0, 130), False, False, True, 3, "mean"),
    (1, 1, 2, 12, 70, 256, 3, 5, False, False, False, 1, "mean"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_values_and_gradients(number, dtype):
    batch, heads, groups, queries, own, width, rows, columns, *settings = CASES[number]
    causal, masked, ranged, fold, reduce = settings
    keys = own * fold
    query, key, row, column, limits = inputs(
        10 * number, batch, heads, groups, queries, keys, width, rows, columns, dtype, own, ranged
    )
    mask = randn(batch, keys, seed=number) > -1 if masked else None
    options = {"causal": causal, "key_mask": mask, "key_range": limits, "fold": fold, "reduce": reduce}
    compare(query, key, row, column, softmax_scale=0.2, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [9, slice(3, 60)])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps_and_windows(dtype, columns, softcap):
    """Scores far below the cap, which hardly change, and scores far above the cap."""
    query, key, rows, columns, _ = inputs(5, 1, 1, 2, 70, 75, 32, 6, columns, dtype, 75)
    compare(query, key, rows, columns, causal=True, window=(20, -1), softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "of a key", "of a head", "of all"])
def test_sinks_and_biases(dtype, kind):
    query, key, rows, columns, _ = inputs(5, 2, 2, 2, 50, 70, 32, 6, 9 if kind else slice(3, 60), dtype, 70)
    bias = additive(kind, 2, 4, 6, 70, 1, dtype) if kind else None
    # One sink takes all the attention: its exponential overflows float32.
    mask, sinks = randn(2, 70, seed=2) > -1, torch.tensor([0.3, 200.0, -0.7, -200.0])
    options = {"softcap": 2.0, "reduce": "none"} if kind == "of a head" else {}
    compare(query, key, rows, columns, causal=True, key_mask=mask, sinks=sinks, bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 4, 40), {"window": (20, -1)}),
        ((2, 1, 18, 40), {"fold": 2, "reduce": "none"}),
        ((1, 2, 18, 1), {"softcap": 2.0, "causal": True}),
        ((2, 2, 18, 40), {"causal": True, "softcap": 0.5}),
    ],
)
def test_the_gradient_of_a_bias_that_samples_heads_rows_or_keys_share(shape, options, dtype):
    fold = options.get("fold", 1)
    query, key, rows, columns, _ = inputs(
        3, 2, 1, 2, 20, 40, 24, shape[2], 9 if shape[0] > 1 else slice(3, 30), dtype, 40 // fold
    )
    bias, sinks = randn(*shape, seed=4, dtype=dtype), randn(2, seed=5, dtype=torch.float32)
    *_, found = compare(query, key, rows, columns, bias=bias, sinks=sinks, **options)
    assert found.shape == shape
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float16).min])
def test_rows_of_which_a_bias_hides_everything(dtype, hidden):
    query, key, *_ = inputs(5, 1, 1, 2, 9, 40, 16, 1, 1, dtype, 40)
    bias = torch.zeros(1, 1, 3, 40, dtype=torch.float16)
    bias[0, 0, 1] = hidden
    for sinks in (None, torch.tensor([0.5, -math.inf])):
        value, grad_query, *_ = compare(
            query, key, torch.tensor([[1, 2, 3]]), slice(None), bias=bias, sinks=sinks
        )
        assert (value[0, 1] == 0).all()
        assert (grad_query[:, :, 2] == 0).all()


def test_a_bias_that_is_no_number_is_not_hidden():
    query, key, *_ = inputs(5, 1, 1, 2, 9, 40, 16, 1, 1, torch.float32, 40)
    bias = torch.zeros(1, 1, 2, 40)
    bias[0, 0, 0, 7] = math.nan
    with mekernels.use_backend("triton"):
        moved = (item.to(DEVICE) for item in (query, key, torch.tensor([[3, 4]])))
        found = mekernels.attention_rows(*moved, slice(None), bias=bias.to(DEVICE))
    assert found[0, 0].isnan().all()
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_and_many_cached_keys(dtype):
    query, key, *_ = inputs(5, 2, 2, 3, 1, 150, 32, 1, 1, dtype, 150)
    value, *_ = compare(query, key, torch.zeros(2, 1, dtype=torch.int64), slice(None), causal=True)
    assert (value > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_rows(dtype):
    query, key, rows, columns, _ = inputs(5, 1, 2, 2, 70, 70, 32, 6, 40, dtype, 70, scale=1e-3)
    compare(query, key, rows, columns, causal=True)


def recomputed(query, key, rows, columns, order):
    """Plain torch whose entries come of scores that are added in another order than those of the sum.

    The gradient of a score is P (W - sum P W), as in the kernels. A softmax whose entries add up to one
    exactly hides the rounding of a score, because 1 - P is exact in it.
    """
    score = reference.attention_scores(query, key)
    again = reference.attention_scores(query[..., order], key[..., order]).detach()
    hidden = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    total = score.detach().masked_fill(hidden, float("-inf")).logsumexp(-1, keepdim=True)
    share = (again - total).exp().masked_fill(hidden, 0)
    change = score - (share * score).sum(-1, keepdim=True)
    maps = (share * (1 + change - change.detach())).mean(1)
    chosen = maps[torch.arange(len(maps))[:, None, None], rows[:, :, None], columns[:, None]]
    return chosen.where((rows >= 0)[:, :, None] & (columns >= 0)[:, None], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [4.0, 12.0])
def test_sharp_rows(dtype, scale):
    """A score is computed once for the sum and once for the entry.

    Tiles of another shape may add in another order, so the two differ by the rounding of a score: a share of
    the attention that grows with the score. The rule compares with plain torch that does the same.
    """
    query, key, rows, columns, _ = inputs(5, 1, 2, 2, 70, 70, 32, 6, 40, dtype, 70, scale=scale)
    arguments = (query, key, rows, columns)
    with mekernels.use_backend("triton"):
        actual = run(mekernels.attention_rows, *arguments, device=DEVICE, causal=True)
    exact = run(reference.attention_rows, *arguments, dtype=torch.float64, causal=True)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(query.shape[-1], generator=generator) for _ in range(8)]
    plain = [run(recomputed, *arguments, order=order) for order in orders]
    for place, (one, wanted, *rough) in enumerate(zip(actual, exact, *plain, strict=True)):
        worst = max(rough, key=lambda item: (item.double() - wanted).abs().max())
        assert_error_rule(one, wanted, worst, factor=3.0 if place else 2.0)


@pytest.mark.parametrize("place", [0, 1])
def test_small_gradients_survive_half_precision(place):
    """A change of a score is 1.5 times the smallest number of float16, which would round it by a third."""
    sign = torch.tensor([1.0, -1.0], dtype=torch.float16).repeat(32)
    tensors = [torch.zeros(1, 1, 64, 16, dtype=torch.float16) for _ in range(2)]
    tensors[1 - place] += sign[:, None]
    pair = [item.to(DEVICE).requires_grad_() for item in tensors]
    with mekernels.use_backend("triton"):
        rows = torch.arange(64, device=DEVICE)[None]
        result = mekernels.attention_rows(*pair, rows, slice(None), softmax_scale=16.0)
    # Every entry is 1/64. Weights of a row add up to zero, so each is 64 times the change of a score.
    weights = 64 * 1.5 * 2.0**-24 * (sign if place == 0 else sign * sign[:, None])
    (found,) = torch.autograd.grad(result, pair[place], weights.to(result).expand(1, 64, 64))
    wanted = 1536 * 2.0**-24 * (torch.ones(64) if place == 0 else sign.float())
    torch.testing.assert_close(found[0, 0].float().cpu(), wanted[:, None].expand(-1, 16), rtol=1e-3, atol=0)


def test_a_row_without_keys_and_padding_are_zero_with_zero_gradients():
    # Several samples: the largest error of plain torch over a few rows alone depends on the processor.
    query, key, *_ = inputs(0, 6, 1, 2, 9, 4, 16, 1, 1, torch.float32, 4)
    rows = torch.tensor([[0, 8, -1, 5, 8]]).expand(6, -1)
    value, grad_query, grad_key = compare(query, key, rows, slice(None), causal=True)
    assert (value[:, 0] == 0).all()
    assert (value[:, 2] == 0).all()
    assert (grad_query[:, :, :5] == 0).all()
    assert (grad_query[0, :, 8] != 0).any()
    assert grad_key.isfinite().all()
    for empty in (torch.full((6, 3), -1), torch.zeros(6, 0, dtype=torch.int64)):
        for item in compare(query, key, empty, slice(None))[1:]:
            assert (item == 0).all()
    for item in compare(query, key, rows, torch.full((6, 3), -1)):
        assert (item == 0).all()


def test_padding_ignores_what_flows_back_to_it():
    query, key, *_ = inputs(0, 1, 1, 2, 9, 40, 16, 1, 1, torch.float32, 40)
    query, key = (item.to(DEVICE).requires_grad_() for item in (query, key))
    rows, columns = torch.tensor([[1, -1]], device=DEVICE), torch.tensor([[0, -1]], device=DEVICE)
    with mekernels.use_backend("triton"):
        result = mekernels.attention_rows(query, key, rows, columns)
    given = torch.full_like(result, math.nan)
    given[0, 0, 0] = 1.0
    for gradient in torch.autograd.grad(result, (query, key), given):
        assert gradient.isfinite().all()


def test_memory_that_is_read_beyond_the_keys_does_not_count():
    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 20, 30, 24, 4, 9, torch.float32, 30)
    padded = torch.full((1, 2, 70, 40), math.nan)
    padded[:, :, 11:41, 5:29] = key
    wanted = compare(query, key, rows, columns)
    for one, other in zip(compare(query, padded[:, :, 11:41, 5:29], rows, columns), wanted, strict=True):
        assert torch.equal(one, other)


def test_double_use_accumulates():
    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 20, 30, 16, 4, 9, torch.float32, 30)

    def twice(query, key, rows, columns):
        return mekernels.attention_rows(query, key, rows, columns) + mekernels.attention_rows(
            query, key, rows.flip(1), columns
        )

    with mekernels.use_backend("triton"):
        actual = run(twice, query, key, rows, columns, device=DEVICE)
    wanted = run(twice, query.double(), key.double(), rows, columns)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_wide_offsets_give_the_same(monkeypatch):
    from mekernels.attention_rows import plan as attention_rows_plan

    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 20, 70, 16, 4, 9, torch.float32, 70)
    wanted = compare(query, key, rows, columns)
    original = attention_rows_plan._launch
    monkeypatch.setattr(
        attention_rows_plan,
        "_launch",
        lambda k, g, t, arguments: original(k, g, t, arguments | {"WIDE": True}),
    )
    for one, other in zip(compare(query, key, rows, columns), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is never touched costs nothing only on the CPU")
def test_strides_beyond_32_bits():
    query, key, rows, columns, _ = inputs(3, 1, 1, 2, 9, 20, 16, 3, 4, torch.float16, 20)
    wanted = compare(query, key, rows, columns)
    torch.use_deterministic_algorithms(False)  # it would fill the gaps between the elements
    far = []
    for item, strides in ((query, (0, 2**31 + 64, 16, 1)), (key, (0, 0, 2**27 + 64, 1))):
        size = sum((n - 1) * stride for n, stride in zip(item.shape, strides, strict=True)) + 1
        view = torch.empty(size, dtype=item.dtype).as_strided(item.shape, strides)
        far.append(view.copy_(item))
    pair = [item.requires_grad_() for item in far]
    with mekernels.use_backend("triton"):
        result = mekernels.attention_rows(*pair, rows, columns)
    gradients = torch.autograd.grad(result, pair, randn(*result.shape, seed=7).to(result))
    for one, other in zip((result, *gradients), wanted, strict=True):
        assert torch.equal(one, other)


def test_operator_checks():
    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 9, 20, 16, 3, 4, torch.float32, 20)
    pair = [item.to(DEVICE).requires_grad_() for item in (query, key)]
    arguments = (rows.to(DEVICE), columns.to(DEVICE), None, None, 0, 0, 0.3, True, 1, True, 0.0)
    sinks = torch.zeros(4, device=DEVICE, requires_grad=True)
    arguments += (sinks, torch.zeros(1, 1, 3, 20, device=DEVICE))
    torch.library.opcheck(torch.ops.mekernels.attention_rows_triton.default, (*pair, *arguments))


def test_what_it_cannot_run_is_refused():
    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 9, 20, 16, 3, 4, torch.float64, 20)
    with mekernels.use_backend("triton"):
        for change, message in ((1, r"got torch\.float64"), (20, "width 320 is above 256")):
            wide = [item.repeat(1, 1, 1, change).to(DEVICE) for item in (query, key)]
            wide = wide if change == 1 else [item.float() for item in wide]
            with pytest.raises(backends.BackendError, match=message):
                mekernels.attention_rows(*wide, rows.to(DEVICE), columns.to(DEVICE))


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    from mekernels.attention_rows import plan as attention_rows_plan

    query, key, rows, columns, _ = inputs(3, 1, 2, 2, 9, 20, 16, 3, 4, torch.float32, 20)
    monkeypatch.setattr(attention_rows_plan, "forward", None)
    mekernels.attention_rows(query, key, rows, columns)
    with mekernels.use_backend("triton"), pytest.raises(TypeError):
        mekernels.attention_rows(query.to(DEVICE), key.to(DEVICE), rows.to(DEVICE), columns.to(DEVICE))
