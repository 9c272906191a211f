"""``attention_rows`` in plain torch, for one layer or several at once, on the CPU and any other device.

Layers that share rows and masks are read together, because a layer of a small model costs less than the
dozens of torch calls that read it. Memory is one block of about :data:`CHUNK_ELEMENTS` scores, or one row of
one key head if that is larger. The backward computes the blocks again.

The layers are the first axis of the tensors here: (L, B, Hk, G, R, Nk), with G query heads for each key head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .call import Call
from .reading import Reading, reading_of

CHUNK_ELEMENTS = 1 << 20
"""Scores computed at a time."""


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of the op: attention, logsumexp of the rows and its rounding rest."""
    out, lse, rest = _Layers.of_call(call).read()
    return out.view(call.out_shape), lse[0], rest[0]


def backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward of the op. It needs no logsumexp: a block holds whole rows."""
    grad_query, grad_key = (
        torch.zeros_like(call.query),
        torch.zeros_like(call.key, dtype=_wide(call.key.dtype)),
    )
    grad_bias = lse.new_zeros(0 if call.bias is None or not of_bias else call.bias.shape)
    layers = _Layers.of_call(call)
    given = grad[:, None] if call.mean else grad
    grad_picked, grad_sinks = layers.gradients(given, grad_key[None], grad_bias if of_bias else None)
    _add_rows(grad_query[None], grad_picked, layers.reading.rows)
    sinks = grad_sinks[0, :0] if call.sinks is None else grad_sinks[0].to(call.sinks.dtype)
    bias = grad_bias if call.bias is None else grad_bias.to(call.bias.dtype)
    return grad_query, grad_key.to(call.key.dtype), sinks, bias


def layer_attention_rows(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Tensor,
    columns: Tensor | slice = slice(None),
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Sequence[Tensor] = (),
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention rows of several layers, averaged over the heads and summed over the layers.

    For the backward, the keys of each layer and the queries of the chosen rows are kept.

    Args:
        queries: for each layer (B, Hq, N, D), floating point, one shape for all.
        keys: for each layer (B, Hk, N, D); Hk divides Hq.
        rows: (B, R) int64 query positions; -1 is padding and gives zeros.
        columns: (B, C) int64 key positions, -1 gives zeros; or a slice of step 1.
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal, key_mask, key_range: as in :func:`mekernels.attention_rows`. A key must pass all of them.
        softcap: scores are softcap * tanh(score / softcap); 0 for none.
        sinks: for each layer (Hq,) logits, as in :func:`mekernels.attention_rows`; none by default.
        mask: (B, 1 or Hq, R, N), bool (True where a key may be seen), or float that is added to the scores.
            Blocked entries of a float mask are -inf or the lowest number of the dtype.
        dtype: queries and keys are first rounded to it; no rounding by default.

    Returns:
        (B, R, C), float64 for float64 input and float32 otherwise; differentiable once, in queries, keys
        and sinks. A row that sees no key is zero.

    Example:
        >>> query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
        >>> read = layer_attention_rows([query, query], [key, key], torch.tensor([[2]]), causal=True)
        >>> round(float(read.sum()), 4)
        2.0
    """
    index, start, stop = None if isinstance(columns, slice) else columns, 0, 0
    if isinstance(columns, slice):
        start, stop, _ = columns.indices(keys[0].shape[2])
    scale = checks.scale(softmax_scale, queries[0].shape[3])
    limits, columns_of = (key_mask, key_range), (start, max(start, stop))
    call = Call(queries[0], keys[0], rows, index, *limits, *columns_of, scale, causal, 1, True, softcap)
    if sinks:
        call = call._replace(sinks=torch.stack([item.detach() for item in sinks]))
    kind = dtype or keys[0].dtype
    return _LayerRows.apply(reading_of(call, mask), kind, len(queries), *queries, *keys, *sinks)


class _LayerRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reading: Reading, kind: torch.dtype, count: int, *tensors: Tensor) -> Tensor:
        queries, keys = tensors[:count], tensors[count : 2 * count]
        picked = [_picked(query, reading.rows) for query in queries]
        ctx.sinks = [item.dtype for item in tensors[2 * count :]]
        ctx.save_for_backward(*picked, *keys)
        ctx.options = reading, kind, queries[0].shape[2]
        return _Layers(picked, keys, reading, kind).read()[0][:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        reading, kind, length = ctx.options
        count = len(ctx.saved_tensors) // 2
        picked, keys = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        (batch, heads, _, width), dtype = picked[0].shape, _wide(kind)
        grad_keys = keys[0].new_zeros(count, *keys[0].shape, dtype=dtype)
        layers = _Layers(picked, keys, reading, kind)
        grad_picked, grad_sinks = layers.gradients(grads[0][:, None], grad_keys)
        # Strided as the queries of a model are, which come from (B, N, Hq, D).
        size = (count, batch, length, heads, width)
        grad_queries = picked[0].new_zeros(size, dtype=dtype).transpose(2, 3)
        _add_rows(grad_queries, grad_picked, reading.rows)
        grad_queries, grad_keys = grad_queries.to(picked[0].dtype), grad_keys.to(keys[0].dtype)
        sinks = [item.to(dtype) for item, dtype in zip(grad_sinks, ctx.sinks, strict=False)]
        return (None, None, None, *grad_queries.unbind(0), *grad_keys.unbind(0), *sinks)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return checks.accumulate_dtype(dtype)


def _may_hold_nan(values: Tensor) -> bool:
    """Whether NaN must be expected. Only the CPU looks, because any other device would have to wait."""
    return values.device.type != "cpu" or not bool(values.isfinite().all())


def _picked(query: Tensor, rows: Tensor) -> Tensor:
    """(B, Hq, R, D) queries of the (B, R) rows, none of which may be negative."""
    if len(rows) == 1:
        return query.index_select(2, rows[0])
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


def _add_rows(target: Tensor, grad_picked: Tensor, rows: Tensor) -> None:
    """Add (L, B, Hq, R, D) to the chosen rows of (L, B, Hq, N, D)."""
    if not rows.numel():
        return
    for sample, row in enumerate(rows):
        added = grad_picked[:, sample]
        if target.dtype != added.dtype:
            # Equal rows are added to the first of them in full precision, without a wait for the device.
            first = (row[:, None] == row).to(torch.uint8).argmax(1)
            added = torch.zeros_like(added).index_add_(2, first, added).to(target.dtype)
        target[:, sample].index_add_(2, row, added)


class _Part(NamedTuple):
    """The layers and heads that are computed at a time, for the samples and rows of a block."""

    samples: slice
    rows: slice
    layers: slice
    groups: slice


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


class _Layers:
    """The queries of the chosen rows and all keys of some layers, with the places to read.

    Args:
        picked: for each layer (B, Hq, R, D).
        keys: for each layer (B, Hk, Nk, D).
        reading: rows, columns and visible keys.
        kind: queries and keys are first rounded to this dtype.
    """

    def __init__(
        self, picked: Sequence[Tensor], keys: Sequence[Tensor], reading: Reading, kind: torch.dtype
    ) -> None:
        self.picked, self.keys, self.reading, self.kind = picked, keys, reading, kind
        self.dtype = _wide(kind)
        self.batch, self.heads, self.rows, self.width = picked[0].shape
        self.groups = keys[0].shape[1]
        self.members = self.heads // self.groups

    @classmethod
    def of_call(cls, call: Call) -> _Layers:
        """Make the single layer of a call of the op."""
        reading = reading_of(call)
        return cls([_picked(call.query, reading.rows)], [call.key], reading, call.key.dtype)

    def blocks(self) -> Iterator[tuple[slice, slice, list[_Part]]]:
        """Samples and rows that share a bias, and the parts of layers and heads to compute for them.

        The layers are split; if one layer is too large, its samples, then its key heads, then its rows.
        """
        window = self.reading.window
        room = CHUNK_ELEMENTS // max(1, self.members * (window.stop - window.start))
        steps = []
        for size in (self.rows, self.groups, self.batch, len(self.keys)):
            steps.append(max(1, min(size, room)))
            room //= max(1, size)
        for samples in _cuts(self.batch, steps[2]):
            for rows in _cuts(self.rows, steps[0]):
                inner = [
                    _Part(samples, rows, layers, groups)
                    for layers in _cuts(len(self.keys), steps[3])
                    for groups in _cuts(self.groups, steps[1])
                ]
                yield samples, rows, inner

    def members_of(self, groups: slice) -> slice:
        """Query heads of some key heads."""
        return slice(groups.start * self.members, groups.stop * self.members)

    def of_heads(self, values: Tensor, groups: slice) -> Tensor:
        """(b, 1 or Hq, r, ..) as (1, b, 1 or h, 1 or G, r, ..)."""
        if values.shape[1] == 1:
            return values[None, :, :, None]
        return values.unflatten(1, (self.groups, self.members))[None, :, groups]

    def factors(self, part: _Part) -> tuple[Tensor, Tensor]:
        """(l * b * h, G * r, D) scaled queries and (l * b * h, n, D) keys."""
        query = _stacked(self.picked[part.layers])[:, part.samples, self.members_of(part.groups), part.rows]
        key = _stacked(self.keys[part.layers])[:, part.samples, part.groups, self.reading.window]
        if self.reading.valid is not None:
            query = query.masked_fill(~self.reading.valid[None, part.samples, None, part.rows, None], 0)
        query = query.to(self.kind).to(self.dtype) * self.reading.softmax_scale
        key = key.to(self.kind).to(self.dtype)
        key_mask = self.reading.key_mask
        if key_mask is not None and _may_hold_nan(key.sum()):
            # A key that is masked is never read: zero times NaN would be NaN in the gradient of a query.
            seen = key_mask[None, part.samples, None, self.reading.window, None]
            key = key.masked_fill(~seen, 0)
        size = key.shape[0] * key.shape[1] * key.shape[2]
        return query.reshape(size, -1, self.width), key.reshape(size, -1, self.width)

    def weights(self, part: _Part, bias: Tensor | None, query: Tensor, key: Tensor) -> _Weights:
        """(l, b, h, G, r, n) exponentials of the scores minus the maximum of the row, and row sums."""
        rows, samples = part.rows.stop - part.rows.start, part.samples.stop - part.samples.start
        size = (-1, samples, part.groups.stop - part.groups.start, self.members, rows, key.shape[1])
        scores, bent = torch.bmm(query, key.mT).view(size), None
        if self.reading.softcap:
            bent = scores.div_(self.reading.softcap).tanh_()
            scores = bent * self.reading.softcap
        if bias is not None:
            bias = self.of_heads(bias, part.groups)
            scores += bias
        top = scores.amax(-1, keepdim=True)
        if bias is not None and _may_hold_nan(top.masked_fill(top == -math.inf, 0)):
            # Minus infinity does not hide NaN or infinity.
            scores.masked_fill_(bias == -math.inf, -math.inf)
            top = scores.amax(-1, keepdim=True)
        sinks = self.sinks(part)
        if sinks is not None:
            top = top.maximum(sinks)
        top.masked_fill_(top == -math.inf, 0)
        values = scores.sub_(top).exp_()
        total = values.sum(-1, keepdim=True)
        sunk = None
        if sinks is not None:
            sunk = (sinks - top).exp_()
            total += sunk
        return _Weights(values, torch.where(total == 0, 0, 1 / total), top, total, bent, sunk)

    def sinks(self, part: _Part) -> Tensor | None:
        """(l, 1, h, G, 1, 1) logits of the sinks."""
        if self.reading.sinks is None:
            return None
        sinks = self.reading.sinks[part.layers, self.members_of(part.groups)].to(self.dtype)
        return sinks.view(len(sinks), 1, -1, self.members, 1, 1)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1 or Hq, R, C) attention summed over the layers; the logsumexp of every row and its rest."""
        reading, device = self.reading, self.keys[0].device
        width = reading.columns.stop - reading.columns.start
        count = width if reading.listed is None else reading.listed.shape[1]
        shape = (self.batch, 1 if reading.mean else self.heads, self.rows)
        out = torch.zeros(*shape, count, dtype=self.dtype, device=device)
        lse = out.new_full((len(self.keys), self.batch, self.heads, self.rows), -math.inf)
        rest = torch.zeros_like(lse)
        if not (reading.window.stop - reading.window.start) * width:
            return out, lse, rest
        written, read = reading.inside
        for samples, rows, parts in self.blocks():
            bias = reading.bias(samples, rows, self.dtype)
            dense = out.new_zeros(*out[samples, :, rows].shape[:3], width)
            for part in parts:
                found = self.weights(part, bias, *self.factors(part))
                mass = found.values.unflatten(-1, (reading.fold, -1))[..., read].mul_(found.share[..., None])
                # A non-finite row is non-finite at the columns that it does not see, too.
                beyond = found.share * 0
                heads = self.members_of(part.groups)
                if reading.mean:
                    dense += beyond.sum((0, 2, 3))[:, None]
                    dense[..., written] += mass.sum((0, 2, 3, 5))[:, None]
                else:
                    dense[:, heads] += beyond.sum(0).flatten(1, 2)
                    dense[:, heads, :, written] += mass.sum((0, 5)).flatten(1, 2)
                place = part.layers, samples, heads, rows
                lse[place], rest[place] = (item.flatten(2, 3) for item in found.logsumexp())
            out[samples, :, rows] = reading.chosen(dense, samples)
        return out.div_(self.heads) if reading.mean else out, lse, rest

    def gradients(
        self, grad: Tensor, grad_keys: Tensor, grad_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the picked queries (L, B, Hq, R, D) and the sinks (L, Hq), from (B, 1 or Hq, R, C).

        The gradients of the keys are added to (L, B, Hk, Nk, D), those of a bias of one layer to a tensor of
        its shape.
        """
        reading = self.reading
        grad_picked = grad.new_zeros((len(self.keys), *self.picked[0].shape), dtype=self.dtype)
        grad_sinks = grad_picked.new_zeros(len(self.keys), self.heads)
        if not reading.window.stop - reading.window.start:
            return grad_picked, grad_sinks
        written, read = reading.inside
        for samples, rows, parts in self.blocks():
            bias = reading.bias(samples, rows, self.dtype)
            given = grad[samples, :, rows].to(self.dtype)
            if reading.mean:
                given = given / self.heads
            if reading.valid is not None:
                given = given.masked_fill(~reading.valid[samples, None, rows, None], 0)
            given = reading.spread(given, samples)[..., None, written]
            for part in parts:
                query, key = self.factors(part)
                found = self.weights(part, bias, query, key)
                seen = found.values.unflatten(-1, (reading.fold, -1))[..., read]
                moved = seen * (self.of_heads(given, part.groups) * found.share[..., None])
                factor = moved.sum((-2, -1)).unsqueeze(-1).mul_(found.share).neg_()
                if found.sunk is not None:
                    change = (factor * found.sunk).sum((1, 4, 5)).flatten(1)
                    grad_sinks[part.layers, self.members_of(part.groups)] += change
                slope = found.values.mul_(factor)
                seen += moved
                if grad_bias is not None:
                    assert bias is not None
                    change = slope.masked_fill(self.of_heads(bias, part.groups) == -math.inf, 0)[0]
                    places = samples, self.members_of(part.groups), rows, reading.window
                    sizes = zip(places, grad_bias.shape, strict=True)
                    target = grad_bias[tuple(slice(None) if size == 1 else at for at, size in sizes)]
                    target += change.flatten(1, 2).sum_to_size(target.shape)
                if found.bent is not None:
                    slope.mul_(found.bent.square_().neg_().add_(1))
                if bias is not None and _may_hold_nan(factor):
                    slope.masked_fill_(self.of_heads(bias, part.groups) == -math.inf, 0)
                slope = slope.view(len(key), -1, key.shape[1])
                _add_product(grad_keys[part.layers, samples, part.groups, reading.window], slope.mT, query)
                target = grad_picked[part.layers, samples, self.members_of(part.groups), rows]
                target.copy_(torch.bmm(slope, key).mul_(reading.softmax_scale).view(target.shape))
        if reading.valid is not None:
            grad_picked.masked_fill_(~reading.valid[:, None, :, None], 0)
        return grad_picked, grad_sinks


class _Weights(NamedTuple):
    """The softmax of some rows, as the product of ``values`` and ``share``."""

    values: Tensor
    """Exponentials of the scores minus ``top``."""
    share: Tensor
    """1 / total, 0 for a row that sees no key."""
    top: Tensor
    total: Tensor
    bent: Tensor | None
    """Hyperbolic tangents of the scores, if there is a soft cap."""
    sunk: Tensor | None
    """Exponentials of the sinks minus ``top``, if there are sinks."""

    def logsumexp(self) -> tuple[Tensor, Tensor]:
        """The logsumexp of each row, without the last axis, and the part that its rounding lost."""
        top, logarithm = self.top[..., 0], self.total[..., 0].log()
        both = top + logarithm
        return both, torch.where(both == -math.inf, 0, top - both + logarithm)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _add_product(target: Tensor, one: Tensor, other: Tensor) -> None:
    """Add the batched product to (l, b, h, n, D)."""
    flat = target.flatten(0, 2)
    if flat.data_ptr() == target.data_ptr():
        flat.baddbmm_(one, other)
    else:
        target += torch.bmm(one, other).view(target.shape)
