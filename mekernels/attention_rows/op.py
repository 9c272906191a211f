"""Chosen rows and columns of an attention map, exact and differentiable, without the map."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from . import composite
from .call import Call


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | slice,
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
    reduce: str = "mean",
) -> Tensor:
    """Softmax attention over all allowed keys, read at chosen rows and columns.

    Exact and differentiable beside any attention of the model: the op needs only the queries and keys of that
    attention. The map is never built: at most rows x keys entries are held, on a GPU fewer.

    Args:
        query: (B, Hq, Nq, D), floating point, any strides.
        key: (B, Hk, Nk, D); Hk divides Hq (grouped-query heads, keys are not repeated).
        rows: (B, R) int64 query positions; -1 is padding and gives zeros. Values are checked only on the CPU;
            on other devices a position out of range counts as padding.
        columns: (B, C) int64 key positions, -1 as above, or a slice. With ``fold`` they are positions in the
            first part.
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal: row i sees key j of a part of n keys when j <= i + n - Nq (ends aligned), so queries may
            continue cached keys. With equal lengths this is j <= i.
        key_mask: (B, Nk) bool, True where a key may be seen.
        key_range: (B, R, 2) int64, the first key position that each row may see and one past the last, for
            instance of its own sequence in a packed batch. Positions count within a part. The other limits
            hold as well.
        window: (left, right), the numbers of keys that a row sees left and right of its own position, as in
            flash-attn; -1 for no limit. The position of row i is i + n - Nq, as with ``causal``.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2; none by default.
        sinks: (Hq,) floating point, one more logit in the softmax of each query head, as in gpt-oss. A row's
            attention to the keys then sums to less than 1.
        bias: (B or 1, Hq or 1, R or 1, Nk) floating point, added to the scores of the chosen rows, after a
            soft cap: ``bias[:, :, r]`` belongs to the row ``rows[:, r]``. -inf, or less than half the lowest
            number of its dtype, hides a key.
        cu_seqlens: (S + 1,) int32 or int64, 0 and the ends of S packed sequences, as in flash-attn. Needs a
            batch of 1, and as many queries as keys of a part. A row sees only its own sequence. The values
            are checked only on the CPU.
        fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow the
            own keys.
        reduce: ``"mean"`` over the heads, or ``"none"``.

    Returns:
        (B, R, C), or (B, Hq, R, C) with ``reduce="none"``; float64 for float64 input and float32 otherwise.
        A row that sees no key is zero. Differentiable once, in query, key, sinks and bias. The backward
        recomputes the rows and is deterministic.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the student's text-to-vision attention of the paper "MotionEnhancer" (CVPR 2026,
    arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> query, key = torch.randn(1, 8, 10, 16), torch.randn(1, 2, 10, 16)
        >>> words = torch.tensor([[7, 9, -1]])
        >>> mekernels.attention_rows(query, key, words, slice(0, 6), causal=True).shape
        torch.Size([1, 3, 6])

        As a training signal: pull the two words toward the first key.

        >>> attention = mekernels.attention_rows(query.requires_grad_(), key, words, slice(0, 1))
        >>> (-attention[:, :2].log().mean()).backward()
        >>> query.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist()
        [7, 9]
    """
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        query, key = backends.meet_in_autocast(query, key)
    checks.query_key(query, key)
    own = checks.fold(fold, key.shape[2])
    checks.index_tensor("rows", rows, 2, layout="(batch, rows)")
    checks.same_device("rows", rows, "query", query)
    checks.shape("rows", rows, (query.shape[0], rows.shape[1]), meaning="(the batch of query, any number)")
    if rows.shape[1] and not query.shape[2]:
        raise ValueError(f"query must have tokens to read {rows.shape[1]} rows, got 0 tokens")
    index, start, stop = checks.columns(columns, query, own)
    checks.boolean("causal", causal)
    checks.key_mask(key_mask, key)
    checks.key_range(key_range, query, rows.shape[1])
    checks.choice("reduce", reduce, ("mean", "none"))
    scale = checks.scale(softmax_scale, query.shape[3])
    cap = checks.softcap(softcap)
    checks.window_size(window)
    checks.sinks(sinks, query)
    size = rows.shape[1], key.shape[2]
    meaning = "(batch, heads, rows, keys), or 1 of any"
    checks.bias(bias, query, size, meaning=meaning, differentiable=True)
    key_range = packed_range(cu_seqlens, key_range, query, own, rows)
    checks.no_functorch("attention_rows")
    limits = key_range
    if window is not None:
        limits = _in_both(_windowed(window, rows, own - query.shape[2], own), key_range)
    options = (scale, causal, fold, reduce == "mean", cap)
    call = Call(query, key, rows, index, key_mask, limits, start, stop, *options, sinks, bias)
    if backends.active() == "reference":
        _index_values(call)
        result = backends.by_reference(
            reference.attention_rows,
            query,
            key,
            rows,
            slice(start, stop) if index is None else index,
            softmax_scale=scale,
            causal=causal,
            key_mask=key_mask,
            key_range=key_range,
            window=window,
            softcap=cap,
            sinks=sinks,
            bias=bias,
            fold=fold,
            reduce=reduce,
        )
        return result.to(checks.accumulate_dtype(query.dtype))
    return attention_rows_op(call)[0]


def lse_of_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    bias: Tensor | None,
    key_range: Tensor | None,
    fold: int,
) -> Tensor:
    """The (B, Hq, Nq) logsumexp of all rows, without a gradient, from checked arguments."""
    own = key.shape[2] // fold
    rows = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
    limits = key_range
    if window is not None:
        limits = _in_both(_windowed(window, rows, own - query.shape[2], own), key_range)
    options = (0, min(1, own), scale, causal, fold, True, softcap)
    return attention_rows_op(Call(query, key, rows, None, key_mask, limits, *options, None, bias))[1]


def _windowed(window: tuple[int, int], rows: Tensor, shift: int, own: int) -> Tensor:
    """(B, R, 2): first and one past the last key that each row sees within a window."""
    left, right = window
    first = torch.zeros_like(rows) if left < 0 else rows + (shift - left)
    last = torch.full_like(rows, own) if right < 0 else rows + (shift + right + 1)
    return torch.stack([first, last], -1)


def packed_range(
    cu_seqlens: Tensor | None, key_range: Tensor | None, query: Tensor, own: int, rows: Tensor | slice
) -> Tensor | None:
    """(B, R, 2): the keys that lie in ``key_range`` and in the packed sequence of each row. None for all."""
    if cu_seqlens is None:
        return key_range
    checks.cu_seqlens(cu_seqlens, query, own)
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=query.device)[None]
    ends = cu_seqlens[1:].to(rows.dtype)
    sequence = torch.searchsorted(ends, rows, right=True).clamp(max=len(ends) - 1)
    return _in_both(torch.stack([cu_seqlens[sequence].to(rows.dtype), ends[sequence]], -1), key_range)


def _in_both(one: Tensor, other: Tensor | None) -> Tensor:
    """The keys that lie in both of two ranges."""
    if other is None:
        return one
    return torch.stack([one[..., 0].maximum(other[..., 0]), one[..., 1].minimum(other[..., 1])], -1)


def _index_values(call: Call) -> None:
    checks.index_values("rows", call.rows, call.query.shape[2])
    if call.columns is not None:
        checks.index_values("columns", call.columns, call.own)


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulate_dtype(call.query.dtype)
    lse = call.query.new_empty((*call.query.shape[:2], call.rows.shape[1]), dtype=dtype)
    return call.query.new_empty(call.out_shape, dtype=dtype), lse, torch.empty_like(lse)


def _fake_backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = lse.new_empty(0) if call.sinks is None else torch.empty_like(call.sinks)
    bias = lse if call.bias is None else call.bias
    bias = bias.new_empty(bias.shape if of_bias else 0)
    return torch.empty_like(call.query), torch.empty_like(call.key), sinks, bias


attention_rows_op = backends.Op("attention_rows", _fake, check=_index_values)
"""(B, R, C) or (B, Hq, R, C) attention, the rows' (B, Hq, R) natural-log logsumexp, and its rest.

Attention is exp(score - logsumexp - rest). The rest corrects the rounding of a large logsumexp.
"""

attention_rows_backward_op = backends.Op("attention_rows_backward", _fake_backward)
"""Gradients of query, key and, if given, sinks, and of the bias if asked; ``lse`` and ``rest`` come from the
forward."""


def _save(ctx, call, output) -> None:
    ctx.settings = call.settings
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *call.tensors)


def _backward(ctx, grad, *_):
    if grad is None:
        return None, None
    lse, rest, *tensors = ctx.saved_tensors
    call = Call.of(tensors, ctx.settings)
    of_bias = ctx.needs_input_grad[Call._fields.index("bias")]
    *found, sinks, bias = attention_rows_backward_op(grad, lse, rest, call, of_bias, backend=ctx.backend)
    sinks, bias = None if call.sinks is None else sinks, bias if of_bias else None
    return *found, *[None] * 11, sinks, bias


def _refuse_second_backward(ctx, *_):
    raise RuntimeError("mekernels.attention_rows can be differentiated once, not twice")


attention_rows_op.differentiable(_save, _backward)
attention_rows_backward_op.differentiable(lambda *_: None, _refuse_second_backward)


@functools.cache
def _plan() -> Any:
    from . import plan

    return plan


def _triton(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return _plan().forward(call)


def _triton_backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _plan().backward(grad, lse, rest, call, of_bias)


def _triton_reasons(call: Call) -> list[str]:
    return launch.reasons(call.query)


def _backward_reasons(grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool) -> list[str]:
    return launch.reasons(call.query)


for name, kernels, plain, reasons in (
    ("attention_rows", _triton, composite.forward, _triton_reasons),
    ("attention_rows_backward", _triton_backward, composite.backward, _backward_reasons),
):
    backends.register(name, "triton", kernels, reasons=reasons, machine=launch.machine)
    backends.register(name, "torch", plain)
