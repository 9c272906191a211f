"""Chosen rows and columns of an attention map, exact and differentiable, without the map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, reference

CHUNK_ELEMENTS = 1 << 20
"""Scores the composite holds at a time."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | slice,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    fold: int = 1,
    reduce: str = "mean",
) -> Tensor:
    """Softmax attention over all allowed keys, read at chosen rows and columns.

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
        fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow the
            own keys.
        reduce: ``"mean"`` over the heads, or ``"none"``.

    Returns:
        (B, R, C), or (B, Hq, R, C) with ``reduce="none"``; float64 for float64 input and float32 otherwise.
        A row that may see no key is zero. Differentiable in query and key; the backward recomputes the rows.

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
    checks.choice("reduce", reduce, ("mean", "none"))
    scale = checks.scale(softmax_scale, query.shape[3])
    checks.no_functorch("attention_rows")
    backend = backends.active()
    if backend == "reference":
        _index_values(query, rows, index, own)
        result = backends.exactly(
            reference.attention_rows,
            query,
            key,
            rows,
            slice(start, stop) if index is None else index,
            softmax_scale=scale,
            causal=causal,
            key_mask=key_mask,
            fold=fold,
            reduce=reduce,
        )
        return result.to(checks.accumulate_dtype(query.dtype))
    return attention_rows_op(
        query, key, rows, index, start, stop, scale, causal, key_mask, fold, reduce == "mean", backend
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
) -> tuple[Tensor, Tensor]:
    """(B, R, C) or (B, Hq, R, C) attention and the rows' (B, Hq, R) natural-log logsumexp."""
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
    )


@attention_rows_op.register_fake
def _(query, key, rows, columns, start, stop, softmax_scale, causal, key_mask, fold, mean, backend):
    dtype = checks.accumulate_dtype(query.dtype)
    batch, heads = query.shape[:2]
    width = stop - start if columns is None else columns.shape[1]
    size = (batch, rows.shape[1], width) if mean else (batch, heads, rows.shape[1], width)
    return query.new_empty(size, dtype=dtype), query.new_empty((batch, heads, rows.shape[1]), dtype=dtype)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; ``lse`` is what the forward returned."""
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
    )


@attention_rows_backward_op.register_fake
def _(grad, query, key, *others):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup(ctx, inputs, output) -> None:
    query, key, rows, columns, *settings = inputs
    start, stop, scale, causal, key_mask, fold, mean, ctx.backend = settings
    ctx.options = (start, stop, scale, causal, fold, mean)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, rows, columns, key_mask, output[1])


def _backward(ctx, grad, _):
    query, key, rows, columns, key_mask, lse = ctx.saved_tensors
    start, stop, scale, causal, fold, mean = ctx.options
    grads = attention_rows_backward_op(
        grad, query, key, rows, columns, start, stop, scale, causal, key_mask, fold, mean, lse, ctx.backend
    )
    return *grads, *[None] * 10


attention_rows_op.register_autograd(_backward, setup_context=_setup)


class _Block(NamedTuple):
    """Scores of some chosen rows of the query heads that share one key head."""

    sample: int
    heads: slice
    group: int
    chosen: slice
    """Places along the R axis."""
    rows: Tensor
    """(r,) query positions, 0 where invalid."""
    valid: Tensor
    """(r,) whether the row is one."""
    query: Tensor
    """(G * r, D), scaled."""
    key: Tensor
    """(Nk, D)."""
    scores: Tensor
    """(G, r, Nk), -inf where a key may not be seen."""


def _blocks(
    query: Tensor, key: Tensor, rows: Tensor, scale: float, causal: bool, key_mask: Tensor | None, fold: int
) -> Iterator[_Block]:
    dtype = checks.accumulate_dtype(query.dtype)
    (batch, _, queries, width), (heads, keys) = query.shape, key.shape[1:3]
    groups, own = query.shape[1] // heads, key.shape[2] // fold
    step = max(1, CHUNK_ELEMENTS // max(1, groups * keys))
    for sample in range(batch):
        for first in range(0, rows.shape[1], step):
            chosen = slice(first, min(first + step, rows.shape[1]))
            row = rows[sample, chosen]
            valid = (row >= 0) & (row < queries)
            row = torch.where(valid, row, 0)
            hidden = None if key_mask is None else ~key_mask[sample]
            if causal:
                position = torch.arange(own, device=query.device).repeat(fold)
                later = position > (row + own - queries)[:, None]
                hidden = later if hidden is None else hidden | later
            for group in range(heads):
                members = slice(group * groups, (group + 1) * groups)
                picked = query[sample, members].index_select(1, row).to(dtype).reshape(-1, width) * scale
                keys_here = key[sample, group].to(dtype)
                scores = (picked @ keys_here.T).view(groups, len(row), keys)
                if hidden is not None:
                    scores.masked_fill_(hidden, -math.inf)
                yield _Block(sample, members, group, chosen, row, valid, picked, keys_here, scores)


class _Columns:
    """Reads and adds the chosen columns of every fold of a (..., Nk) tensor."""

    def __init__(
        self, columns: Tensor | None, sample: int, start: int, stop: int, own: int, fold: int
    ) -> None:
        self.parts: list[slice | Tensor]
        self.valid: Tensor | None = None
        offsets = [own * part for part in range(fold)]
        if columns is None:
            self.parts = [slice(start + offset, stop + offset) for offset in offsets]
        else:
            column = columns[sample]
            self.valid = (column >= 0) & (column < own)
            column = torch.where(self.valid, column, 0)
            self.parts = [column + offset for offset in offsets]

    def read(self, source: Tensor, part: slice | Tensor) -> Tensor:
        return source[..., part] if isinstance(part, slice) else source.index_select(-1, part)

    def add(self, target: Tensor, part: slice | Tensor, value: Tensor) -> None:
        if isinstance(part, slice):
            target[..., part] += value
        else:
            target.index_add_(-1, part, value)


def _forward(
    query, key, rows, columns, start, stop, scale, causal, key_mask, fold, mean
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(query.dtype)
    batch, heads = query.shape[:2]
    width = stop - start if columns is None else columns.shape[1]
    size = (batch, rows.shape[1], width) if mean else (batch, heads, rows.shape[1], width)
    out = query.new_zeros(size, dtype=dtype)
    lse = query.new_full((batch, heads, rows.shape[1]), -math.inf, dtype=dtype)
    own = key.shape[2] // fold
    if not own:
        return out, lse
    for block in _blocks(query, key, rows, scale, causal, key_mask, fold):
        total = block.scores.logsumexp(-1)
        lse[block.sample, block.heads, block.chosen] = total
        shift = total.masked_fill(total == -math.inf, 0)[..., None]
        reader = _Columns(columns, block.sample, start, stop, own, fold)
        mass = sum((reader.read(block.scores, part) - shift).exp_() for part in reader.parts)
        assert isinstance(mass, Tensor)
        mass.masked_fill_(~block.valid[:, None], 0)
        if reader.valid is not None:
            mass.masked_fill_(~reader.valid, 0)
        if mean:
            out[block.sample, block.chosen] += mass.sum(0)
        else:
            out[block.sample, block.heads, block.chosen] = mass
    return out.div_(heads) if mean else out, lse


def _backward_rows(
    grad, query, key, rows, columns, start, stop, scale, causal, key_mask, fold, mean, lse
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(query.dtype)
    heads, own = query.shape[1], key.shape[2] // fold
    grad_query = query.new_zeros(query.shape)
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    if not own:
        return grad_query, grad_key.to(key.dtype)
    added: Tensor | None = None
    for block in _blocks(query, key, rows, scale, causal, key_mask, fold):
        total = lse[block.sample, block.heads, block.chosen]
        shift = total.masked_fill(total == -math.inf, 0)[..., None]
        weights = block.scores.sub_(shift).exp_()
        if mean:
            given = grad[block.sample, block.chosen].to(dtype) / heads
        else:
            given = grad[block.sample, block.heads, block.chosen].to(dtype)
        given = given.masked_fill(~block.valid[:, None], 0)
        reader = _Columns(columns, block.sample, start, stop, own, fold)
        if reader.valid is not None:
            given = given.masked_fill(~reader.valid, 0)
        moved = [reader.read(weights, part) * given for part in reader.parts]
        slope = weights.mul_(-sum(item.sum(-1, keepdim=True) for item in moved))
        for part, item in zip(reader.parts, moved, strict=True):
            reader.add(slope, part, item)
        slope = slope.reshape(-1, slope.shape[-1])
        grad_key[block.sample, block.group].addmm_(slope.T, block.query)
        picked = (slope @ block.key).mul_(scale).view(*block.scores.shape[:2], -1)
        added = picked.new_zeros(picked.shape[0], query.shape[2], picked.shape[2])
        added.index_add_(1, block.rows, picked)
        grad_query[block.sample, block.heads] += added.to(query.dtype)
    return grad_query, grad_key.to(key.dtype)


backends.register("attention_rows", "torch", _forward)
backends.register("attention_rows_backward", "torch", _backward_rows)
