"""Chosen rows and columns of an attention map, exact and differentiable, without the map."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from . import composite


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
    fold: int = 1,
    reduce: str = "mean",
) -> Tensor:
    """Softmax attention over all allowed keys, read at chosen rows and columns.

    Exact and differentiable next to any attention the model runs: all it needs are the queries and keys that
    attention was given. The map is never built; rows x keys is the most that is held, and on a GPU less.

    Args:
        query: (B, Hq, Nq, D), floating point, any strides.
        key: (B, Hk, Nk, D); Hk divides Hq (grouped-query heads, keys are not repeated).
        rows: (B, R) int64 query positions; -1 is padding and gives zeros. Values are checked on the CPU only:
            elsewhere a position out of range counts as padding.
        columns: (B, C) int64 key positions, -1 as above, or a slice. With ``fold`` they count in the first
            part.
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal: row i sees key j of a part of n keys when j <= i + n - Nq: ends aligned, j <= i where the
            lengths agree.
        key_mask: (B, Nk) bool, True where a key may be seen.
        key_range: (B, R, 2) int64, first and one past the last key position each row may see, for instance
            those of its own sequence in a packed batch. Counted in a part; other limits hold as well.
        fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow the
            own keys.
        reduce: ``"mean"`` over the heads, or ``"none"``.

    Returns:
        (B, R, C), or (B, Hq, R, C) with ``reduce="none"``; float64 for float64 input and float32 otherwise.
        A row that may see no key is zero. Differentiable in query and key, once; the backward recomputes the
        rows, and is the same from run to run.

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
        query, key = _autocast(query, key)
    checks.query_key(query, key)
    own = checks.fold(fold, key.shape[2])
    checks.index_tensor("rows", rows, 2, layout="(batch, rows)")
    checks.same_device("rows", rows, "query", query)
    checks.shape("rows", rows, (query.shape[0], rows.shape[1]), meaning="(the batch of query, any number)")
    index, start, stop = _columns(columns, query, own)
    checks.boolean("causal", causal)
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask must be a bool torch.Tensor, got {kind}")
        checks.shape("key_mask", key_mask, (key.shape[0], key.shape[2]), meaning="(batch, keys)")
        checks.same_device("key_mask", key_mask, "query", query)
    if key_range is not None:
        checks.index_tensor("key_range", key_range, 3, layout="(batch, rows, first and end)")
        checks.shape("key_range", key_range, (*rows.shape, 2), meaning="(batch, rows, first and end)")
        checks.same_device("key_range", key_range, "query", query)
    checks.choice("reduce", reduce, ("mean", "none"))
    scale = checks.scale(softmax_scale, query.shape[3])
    checks.no_functorch("attention_rows")
    backend = backends.active()
    if backend == "reference":
        _index_values(query, rows, index, own)
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
            fold=fold,
            reduce=reduce,
        )
        return result.to(checks.accumulate_dtype(query.dtype))
    mean = reduce == "mean"
    return attention_rows_op(
        query, key, rows, index, start, stop, scale, causal, key_mask, fold, mean, backend, key_range
    )[0]


def _autocast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast rotary embeddings may leave one of the two in float32: meet in the autocast dtype."""
    device = query.device.type
    if query.dtype != key.dtype and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if query.is_floating_point() and key.is_floating_point():
            return query.to(dtype), key.to(dtype)
    return query, key


def _columns(columns: Tensor | slice, query: Tensor, own: int) -> tuple[Tensor | None, int, int]:
    """Columns as an index tensor, or as None with start and stop."""
    if isinstance(columns, slice):
        start, stop, step = columns.indices(own)
        if step == 1:
            return None, start, max(start, stop)
        index = torch.arange(start, stop, step, device=query.device)
        return index.expand(query.shape[0], -1), 0, 0
    if not isinstance(columns, Tensor):
        raise TypeError(f"columns must be a slice or an int64 torch.Tensor, got {type(columns).__name__}")
    checks.index_tensor("columns", columns, 2, layout="(batch, columns)")
    checks.same_device("columns", columns, "query", query)
    meaning = "(the batch of query, any number)"
    checks.shape("columns", columns, (query.shape[0], columns.shape[1]), meaning=meaning)
    return columns, 0, 0


def _index_values(query: Tensor, rows: Tensor, columns: Tensor | None, own: int) -> None:
    checks.index_values("rows", rows, query.shape[2])
    if columns is not None:
        checks.index_values("columns", columns, own)


@torch.library.custom_op("mekernels::attention_rows", mutates_args=())
def attention_rows_op(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    start: int,
    stop: int,
    softmax_scale: float,
    causal: bool,
    key_mask: Tensor | None,
    fold: int,
    mean: bool,
    backend: str,
    key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, R, C) or (B, Hq, R, C) attention, the rows' (B, Hq, R) natural-log logsumexp, and its rest.

    Attention is exp(score - logsumexp - rest): the logsumexp of large scores alone is rounded too far.
    """
    _index_values(query, rows, columns, key.shape[2] // fold)
    return backends.dispatch(
        "attention_rows",
        backend,
        query,
        key,
        rows,
        columns,
        start,
        stop,
        softmax_scale,
        causal,
        key_mask,
        fold,
        mean,
        key_range,
    )


@attention_rows_op.register_fake
def _(query, key, rows, columns, start, stop, scale, causal, mask, fold, mean, backend, key_range=None):
    dtype = checks.accumulate_dtype(query.dtype)
    batch, heads = query.shape[:2]
    width = stop - start if columns is None else columns.shape[1]
    size = (batch, rows.shape[1], width) if mean else (batch, heads, rows.shape[1], width)
    lse = query.new_empty((batch, heads, rows.shape[1]), dtype=dtype)
    return query.new_empty(size, dtype=dtype), lse, torch.empty_like(lse)


@torch.library.custom_op("mekernels::attention_rows_backward", mutates_args=())
def attention_rows_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    start: int,
    stop: int,
    softmax_scale: float,
    causal: bool,
    key_mask: Tensor | None,
    fold: int,
    mean: bool,
    lse: Tensor,
    rest: Tensor,
    backend: str,
    key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; ``lse`` and ``rest`` are what the forward returned."""
    return backends.dispatch(
        "attention_rows_backward",
        backend,
        grad,
        query,
        key,
        rows,
        columns,
        start,
        stop,
        softmax_scale,
        causal,
        key_mask,
        fold,
        mean,
        lse,
        rest,
        key_range,
    )


@attention_rows_backward_op.register_fake
def _(grad, query, key, *others):
    return torch.empty_like(query), torch.empty_like(key)


def _setup(ctx, inputs, output) -> None:
    query, key, rows, columns, *settings, key_mask, fold, mean, ctx.backend, key_range = inputs
    ctx.settings, ctx.options = settings, (fold, mean)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, rows, columns, key_mask, key_range, *output[1:])


def _backward(ctx, grad, *_):
    *inputs, key_mask, key_range, lse, rest = ctx.saved_tensors
    grads = attention_rows_backward_op(
        grad, *inputs, *ctx.settings, key_mask, *ctx.options, lse, rest, ctx.backend, key_range
    )
    return *grads, *[None] * 11


def _second_backward(ctx, *_):
    raise RuntimeError("mekernels.attention_rows can be differentiated once, not twice")


attention_rows_op.register_autograd(_backward, setup_context=_setup)
attention_rows_backward_op.register_autograd(_second_backward)


def _triton(*args):
    from . import plan

    return plan.forward(*args)


def _triton_backward(*args):
    from . import plan

    return plan.backward(*args)


def _triton_reasons(query, *others) -> list[str]:
    return launch.reasons(query)


def _triton_backward_reasons(grad, query, *others) -> list[str]:
    return launch.reasons(query)


backends.register("attention_rows", "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register("attention_rows", "torch", composite.forward)
backends.register(
    "attention_rows_backward",
    "triton",
    _triton_backward,
    reasons=_triton_backward_reasons,
    machine=launch.machine,
)
backends.register("attention_rows_backward", "torch", composite.backward)
