"""Entries of an attention map and sums of them, from query, key and the rows' logsumexp, without the map."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from ..attention_rows.op import lse_of_rows, packed_range
from . import composite
from .call import Call

Options = tuple[float, int, int, float]
"""The last fields of a call: scale, keys to the left and to the right, and soft cap."""


def attention_columns(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    columns: Tensor | slice,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fold: int = 1,
    reduce: str = "mean",
) -> Tensor:
    """Chosen columns of an attention map: how much every row looks at a few keys.

    An entry is exp(score - logsumexp of its row). It needs no other key, so a column costs as much as one key
    of the attention.

    Args:
        query: (B, Hq, Nq, D), floating point, any strides.
        key: (B, Hk, Nk, D); Hk divides Hq (grouped-query heads, keys are not repeated).
        lse: (B, Hq, Nq) natural-log logsumexp of the rows as :func:`mekernels.flash_attention` or
            :func:`mekernels.attention_lse` returns it, float64 for float64 input and float32 otherwise. It
            must come from the same attention: same scale, keys, soft cap, bias and sinks. Sinks enter here
            only through ``lse``. Limits (``causal``, ``key_mask``, ``key_range``, ``window``) may be narrower
            than those of ``lse``. The op then reads fewer keys, but the softmax is still that over all keys
            of ``lse``.
        columns: (B, C) int64 key positions, -1 is padding and gives zeros; or a slice. With ``fold`` they are
            positions in the first part. Values are checked only on the CPU; on other devices a position out
            of range counts as padding.
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal: row i sees key j when j <= i + Nk - Nq (ends aligned), so queries may continue cached keys. A
            key that a row does not see gives 0.
        key_mask: (B, Nk) bool, True where a key may be seen.
        key_range: (B, Nq, 2) int64, the first key position that each row sees and one past the last;
            otherwise as in :func:`mekernels.attention_rows`.
        window, softcap, cu_seqlens, fold: as in :func:`mekernels.attention_rows`.
        bias: (B or 1, Hq or 1, Nq or 1, fold * C or 1) floating point, added to the scores of the chosen
            columns, part by part, after a soft cap; ``bias[..., c]`` belongs to the key ``columns[:, c]``.
            -inf, or less than half the lowest number of its dtype, hides a key. The bias has no gradient.
        reduce: ``"mean"`` over the heads, or ``"none"``.

    Returns:
        (B, Nq, C), or (B, Hq, Nq, C) with ``reduce="none"``; float64 for float64 input and float32 otherwise.
        Differentiable once, in query, key and lse. For the full gradient of the softmax, pass a
        differentiable lse, as :func:`mekernels.flash_attention` returns it. The backward recomputes the
        entries and is deterministic, with one exception: on a CPU, several threads add the gradients of
        equal columns in no fixed order, unless ``torch.use_deterministic_algorithms(True)`` is set.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the logsumexp every flash attention keeps for its backward (Dao et al., FlashAttention, 2022).

    Example:
        >>> import torch, mekernels
        >>> query, key = torch.randn(1, 8, 10, 16), torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, key, key, causal=True)
        >>> mekernels.attention_columns(query, key, lse, torch.tensor([[0, 3]]), causal=True).shape
        torch.Size([1, 10, 2])
    """
    limits = softmax_scale, causal, window, softcap
    query, key, options = checked("attention_columns", query, key, key_mask, *limits)
    checks.logsumexp(lse, query)
    own = checks.fold(fold, key.shape[2])
    index, start, stop = checks.columns(columns, query, own)
    checks.choice("reduce", reduce, ("mean", "none"))
    if index is not None:
        checks.index_values("columns", index, own)
    rows, count = slice(0, query.shape[2]), stop - start if index is None else index.shape[1]
    checks.key_range(key_range, query, rows.stop)
    key_range = packed_range(cu_seqlens, key_range, query, own, rows)
    checks.bias(bias, query, (rows.stop, fold * count), meaning="(batch, heads, rows, columns), or 1 of any")
    if backends.active() == "reference":
        chosen = slice(start, stop) if index is None else index
        named = dict(zip(LIMITS, limits, strict=True)) | {"key_mask": key_mask, "bias": bias}
        named |= {"key_range": key_range, "fold": fold}
        found = backends.by_reference(
            reference.attention_columns, query, key, lse, chosen, reduce=reduce, **named
        )
        return found.to(checks.accumulate_dtype(query.dtype))
    given = key_mask, None, key_range, fold
    if index is None:
        part = window_of(query, key, lse, rows, slice(start, stop), options, *given)
    else:
        part = columns_of(window_of(query, key, lse, rows, slice(0, own), options, *given), index, fold)
    return folded(attention_columns_op(part._replace(bias=bias), reduce == "mean"), fold)


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    over: str,
    reduce: str = "sum",
    rows: slice | None = None,
    columns: slice | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fold: int = 1,
) -> Tensor:
    """Sums of an attention map over its rows or its columns: how much attention each key receives.

    The only memory needed is the result: no entry is stored.

    Args:
        query, key, lse, softmax_scale, causal, key_mask, window, softcap, cu_seqlens, fold: as in
            :func:`mekernels.attention_columns`.
        over: ``"rows"``: for each key, the sum over the rows. ``"columns"``: for each row, the sum over the
            keys, which is 1 over all keys.
        reduce: ``"sum"``, ``"mean"`` over all places of the window, hidden ones included, or ``"max"``, which
            needs a ``fold`` of 1, because the maximum of a sum is not the sum of the maxima.
        rows: the window of rows, a slice of step 1, such as ``slice(-32, None)``; all by default.
        columns: the window of keys of a part, a slice of step 1; all by default.
        key_range: (B, R, 2) for the window of rows; otherwise as in :func:`mekernels.attention_columns`.
        bias: (B or 1, Hq or 1, R or 1, fold * C or 1) for the windows of rows and keys; otherwise as in
            :func:`mekernels.attention_columns`.

    Returns:
        (B, Hq, C) for the keys of the window with ``over="rows"``, (B, Hq, R) for its rows with
        ``over="columns"``; float64 for float64 input and float32 otherwise. Sum and mean are differentiable
        in query, key and lse, once; see :func:`mekernels.attention_columns`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. ``reduce="max"`` has no
            gradient, so inputs that require one are refused.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the accumulated attention of H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048). Over the last
    rows it is the score of SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469).

    Example:
        >>> import torch, mekernels
        >>> query, key = torch.randn(1, 8, 10, 16), torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, key, key, causal=True)
        >>> received = mekernels.attention_sums(query, key, lse, over="rows", causal=True)
        >>> received.shape, round(float(received.sum()), 3)
        (torch.Size([1, 8, 10]), 80.0)
    """
    limits = softmax_scale, causal, window, softcap
    query, key, options = checked("attention_sums", query, key, key_mask, *limits)
    checks.logsumexp(lse, query)
    checks.choice("over", over, ("rows", "columns"))
    checks.choice("reduce", reduce, ("sum", "mean", "max"))
    own = checks.fold(fold, key.shape[2])
    if reduce == "max" and fold > 1:
        raise ValueError(f"fold must be 1 with reduce='max', got {fold}")
    windows = {
        "rows": checks.window("rows", rows, query.shape[2]),
        "columns": checks.window("columns", columns, own),
    }
    size = {name: item.stop - item.start for name, item in windows.items()}
    checks.key_range(key_range, query, size["rows"])
    key_range = packed_range(cu_seqlens, key_range, query, own, windows["rows"])
    shape = size["rows"], fold * size["columns"]
    checks.bias(bias, query, shape, meaning="(batch, heads, rows, columns), or 1 of any")
    wanted = torch.is_grad_enabled() and any(item.requires_grad for item in (query, key, lse))
    if reduce == "max" and wanted:
        raise ValueError(
            "reduce='max' has no gradient, and query, key or lse requires one: use 'sum' or 'mean', "
            "or call it under torch.no_grad()"
        )
    if backends.active() == "reference":
        named = dict(zip(LIMITS, limits, strict=True)) | {"key_mask": key_mask, "bias": bias}
        named |= {"key_range": key_range, "fold": fold}
        found = backends.by_reference(
            reference.attention_sums, query, key, lse, over=over, reduce=reduce, **windows, **named
        )
        return found.to(checks.accumulate_dtype(query.dtype))
    given = key_mask, bias, key_range, fold
    part = window_of(query, key, lse, windows["rows"], windows["columns"], options, *given)
    found = attention_sums_op(part, over == "rows", reduce == "max")
    found = folded(found, fold) if over == "rows" else found
    return found / max(1, size[over]) if reduce == "mean" else found


def attention_lse(
    query: Tensor,
    key: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fold: int = 1,
) -> Tensor:
    """The logsumexp of every row, also with masks, windows, soft caps, sinks and biases.

    Use it where the model's attention does not return the logsumexp. It computes the scores of the attention
    once and stores no map.

    Args:
        query, key, softmax_scale, causal, key_mask, window, softcap, sinks, cu_seqlens, fold: as in
            :func:`mekernels.attention_rows`.
        key_range, bias: of all rows; otherwise as in :func:`mekernels.attention_columns`.

    Returns:
        (B, Hq, Nq), natural logarithm, float64 for float64 input and float32 otherwise; -inf for a row that
        sees no key. Differentiable once, in query, key and sinks.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Example:
        >>> import torch, mekernels
        >>> query, key, sinks = torch.randn(1, 8, 10, 16), torch.randn(1, 2, 10, 16), torch.zeros(8)
        >>> lse = mekernels.attention_lse(query, key, causal=True, window=(4, -1), sinks=sinks)
        >>> mekernels.attention_columns(
        ...     query, key, lse, slice(0, 1), causal=True, window=(4, -1)
        ... )[0, 5:, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    limits = softmax_scale, causal, window, softcap
    query, key, options = checked("attention_lse", query, key, key_mask, *limits)
    checks.sinks(sinks, query)
    size, own = (query.shape[2], key.shape[2]), checks.fold(fold, key.shape[2])
    checks.key_range(key_range, query, size[0])
    rows, columns = slice(0, size[0]), slice(0, own)
    key_range = packed_range(cu_seqlens, key_range, query, own, rows)
    checks.bias(bias, query, size, meaning="(batch, heads, rows, keys), or 1 of any")
    if backends.active() == "reference":
        named = dict(zip(LIMITS, limits, strict=True)) | {"key_mask": key_mask, "bias": bias}
        named |= {"key_range": key_range, "fold": fold}
        found = backends.by_reference(reference.attention_lse, query, key, sinks=sinks, **named)
        return found.to(checks.accumulate_dtype(query.dtype))
    given = bias, key_range, fold
    with torch.no_grad():
        lse = lse_of_rows(query, key, options[0], causal, key_mask, window, options[3], *given)
    lse = attention_lse_op(window_of(query, key, lse, rows, columns, options, key_mask, *given))
    if sinks is None:
        return lse
    # A sink of -inf changes nothing. Beside a row that sees no key, its derivative would be NaN.
    off = (sinks == -torch.inf)[:, None]
    sunk = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].masked_fill(off, 0.0))
    return torch.where(off, lse, sunk)


def differentiable_lse(query: Tensor, key: Tensor, lse: Tensor, options: Options) -> Tensor:
    """Make a given logsumexp differentiable in query and key, for a logsumexp of any attention.

    Its gradient is one more attention with the keys as values, because d lse / d score is the attention
    itself. It is computed only if a gradient reaches the logsumexp.
    """
    rows, columns = slice(0, query.shape[2]), slice(0, key.shape[2])
    return attention_lse_op(window_of(query, key, lse, rows, columns, options))


LIMITS = ("softmax_scale", "causal", "window", "softcap")
"""Options that the ops have in common, tensors aside."""


def checked(
    op: str,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Options]:
    """Check the common arguments; return query and key in one dtype, and the options of a call."""
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        query, key = backends.meet_in_autocast(query, key)
    checks.query_key(query, key)
    checks.boolean("causal", causal)
    checks.key_mask(key_mask, key)
    checks.window_size(window)
    checks.no_functorch(op)
    checks.no_tangents(op, (query, key))
    left, right = window or (-1, -1)
    scale, cap = checks.scale(softmax_scale, query.shape[3]), checks.softcap(softcap)
    return query, key, (scale, left, 0 if causal else right, cap)


def window_of(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: slice,
    columns: slice,
    options: Options,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_range: Tensor | None = None,
    fold: int = 1,
) -> Call:
    """A window of the map; ``columns`` are positions in a part of the keys."""
    own = key.shape[2] // fold

    def of_parts(item: Tensor, axis: int) -> Tensor:
        length = columns.stop - columns.start
        parts = item.unflatten(axis, (fold, own)).narrow(axis + 1, columns.start, length)
        return parts.flatten(axis, axis + 1)

    places = None
    if key_mask is not None or fold > 1:
        position = torch.arange(columns.start, columns.stop, device=key.device).repeat(fold)
        places = position.expand(len(key), -1)
        if key_mask is not None:
            places = torch.where(of_parts(key_mask, 1), position, -1)
    shift = own - query.shape[2] + rows.start
    tensors = query[:, :, rows], of_parts(key, 2), lse[:, :, rows], places, bias
    limits = None if key_range is None else key_range.clamp(0, own).to(torch.int32)
    return Call(*tensors, limits, columns.start, shift, *options)


def columns_of(part: Call, index: Tensor, fold: int) -> Call:
    """The (B, C) listed keys of a part with all keys, from each part of the keys."""
    key, places, bias, own = part.key, part.places, part.bias, part.key.shape[2] // fold
    index = torch.where((index >= 0) & (index < own), index, -1).repeat(1, fold)
    begins = own * torch.arange(fold, device=key.device).repeat_interleave(index.shape[1] // fold)
    place, sample = index.clamp(min=0) + begins, torch.arange(len(key), device=key.device)[:, None]
    if not own:
        key = key.new_zeros((*key.shape[:2], 1, key.shape[3]))
    elif places is not None:
        index = index.masked_fill(places[sample, place] < 0, -1)
    # Indexed like this, a GPU adds the gradients of equal columns in a fixed order.
    picked = key.transpose(1, 2)[sample, place].transpose(1, 2)
    if bias is not None and bias.shape[3] > 1:
        bias = bias.expand(len(key), -1, -1, -1)
        bias = bias.gather(3, place[:, None, None].expand(*bias.shape[:3], -1))
    return part._replace(key=picked, places=index, bias=bias, start=0)


def folded(entries: Tensor, fold: int) -> Tensor:
    """The entries of all parts of the keys, the last axis, added."""
    return entries if fold == 1 else entries.unflatten(-1, (fold, entries.shape[-1] // fold)).sum(-2)


def _fake_columns(call: Call, mean: bool) -> Tensor:
    batch, heads, *size = call.map_shape
    shape = (batch, *size) if mean else (batch, heads, *size)
    return call.query.new_empty(shape, dtype=checks.accumulate_dtype(call.query.dtype))


def _fake_sums(call: Call, over_rows: bool, largest: bool) -> Tensor:
    batch, heads, rows, keys = call.map_shape
    dtype = checks.accumulate_dtype(call.query.dtype)
    return call.query.new_empty((batch, heads, keys if over_rows else rows), dtype=dtype)


def _fake_lse(call: Call) -> Tensor:
    return torch.empty_like(call.lse, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    query, key, lse = (item.new_empty(item.shape) for item in call[:3])
    return query, key, lse


attention_columns_op = backends.Op("attention_columns", _fake_columns)
"""(B, R, C) mean over the heads, or (B, Hq, R, C)."""

attention_sums_op = backends.Op("attention_sums", _fake_sums)
"""Sum or maximum over the rows (B, Hq, C) or over the keys (B, Hq, R)."""

attention_lse_op = backends.Op("attention_lse", _fake_lse)
"""A copy of the logsumexp that has a gradient."""

attention_entries_backward_op = backends.Op("attention_entries_backward", _fake_backward)
"""Gradients of query, key and logsumexp from the (B, Hq, R, C) gradient of the entries, maybe expanded."""


def _save(ctx: Any, call: Call, *rest: Any) -> None:
    ctx.options, ctx.rest = call[6:], rest[:-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:6])


def _backward(ctx: Any, grad: Tensor | None, spread: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    call = Call._make((*ctx.saved_tensors, *ctx.options))
    given = spread(grad, call, *ctx.rest).expand(call.map_shape)
    return attention_entries_backward_op(given, call, backend=ctx.backend)


def _of_columns(grad: Tensor, call: Call, mean: bool) -> Tensor:
    return grad[:, None] / call.query.shape[1] if mean else grad


def _of_sums(grad: Tensor, call: Call, over_rows: bool, largest: bool) -> Tensor:
    return grad[:, :, None] if over_rows else grad[..., None]


def _of_lse(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    # The logsumexp is an argument of the op; its own gradient is computed elsewhere.
    return (*_backward(ctx, grad, lambda grad, call: grad[..., None])[:2], None)


def _refuse_second_backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError("mekernels' readings of an attention map can be differentiated once, not twice")


attention_columns_op.differentiable(_save, functools.partial(_backward, spread=_of_columns))
attention_sums_op.differentiable(_save, functools.partial(_backward, spread=_of_sums))
attention_lse_op.differentiable(_save, _of_lse)
attention_entries_backward_op.differentiable(lambda *_: None, _refuse_second_backward)


@functools.cache
def _plan() -> Any:
    from . import plan

    return plan


def _triton_columns(call: Call, mean: bool) -> Tensor:
    return _plan().columns(call, mean)


def _triton_sums(call: Call, over_rows: bool, largest: bool) -> Tensor:
    return _plan().sums(call, over_rows, largest)


def _triton_backward(grad: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return _plan().backward(grad, call)


def _copied_lse(call: Call) -> Tensor:
    return call.lse.clone(memory_format=torch.contiguous_format)


def _triton_reasons(*args: Any) -> list[str]:
    return launch.reasons(next(item for item in args if isinstance(item, Call)).query)


for name, kernels, plain in (
    ("attention_columns", _triton_columns, composite.columns),
    ("attention_sums", _triton_sums, composite.sums),
    ("attention_lse", _copied_lse, _copied_lse),
    ("attention_entries_backward", _triton_backward, composite.backward),
):
    backends.register(name, "triton", kernels, reasons=_triton_reasons, machine=launch.machine)
    backends.register(name, "torch", plain)
