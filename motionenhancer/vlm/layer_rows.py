"""Rows of the attention of several layers at once, under any mask, in plain torch.

On a CPU a tiny model's layer costs less than the dozens of calls that reading it alone would take, so that
layers which share one mask are read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RowMask", "layer_attention_rows", "select_columns"]

CHUNK_SCORES = 1 << 18
"""Scores computed at a time, so that they stay in a core's cache."""


@dataclass(frozen=True)
class RowMask:
    """Which keys the rows may see, ready to be added to the scores.

    rows: (B, R) int64 query positions, 0 where invalid.
    bias: (B, 1 or Hq, R, N) float, -inf where a key is hidden; 0 all along the rows that see no key.
    blind: (B, 1 or Hq, R, 1) bool, the rows that see no key; None where there are none.
    keys: all visible keys lie in [first, end).
    """

    rows: Tensor
    bias: Tensor
    blind: Tensor | None
    keys: tuple[int, int]

    @staticmethod
    def of(mask: Tensor, rows: Tensor, dtype: torch.dtype) -> RowMask:
        """Make one of ``mask`` (B, 1 or Hq, R, N), boolean (True: may be seen) or added to the scores.

        Blocked entries of a float mask are -inf or the type's lowest number. Negative rows see nothing.
        """
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen & (rows >= 0)[:, None, :, None]
        blind = ~seen.any(dim=-1, keepdim=True)
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
        if mask.dtype != torch.bool:
            bias += mask.masked_fill(~seen, 0)
        bias.masked_fill_(~(seen | blind), float("-inf"))
        places = seen.flatten(0, 2).any(dim=0).nonzero()
        keys = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        return RowMask(rows.clamp(min=0), bias, blind if bool(blind.any()) else None, keys)


def layer_attention_rows(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    mask: RowMask,
    *,
    softmax_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Read softmax attention at chosen rows, mean over the heads and summed over the layers.

    Backward recomputes the scores: of each layer its keys are kept, and the queries of the chosen rows.

    Parameters
    ----------
    queries: for each layer (B, Hq, N, D), any float type, one shape for all.
    keys: for each layer (B, Hkv, N, D); Hkv divides Hq.
    mask: the rows, and which keys each may see.
    softmax_scale: D ** -0.5 by default.
    dtype: queries and keys are rounded to it first; not at all by default.

    Returns
    -------
    (B, R, N) float32, float64 for float64 inputs; differentiable once in queries and keys. A row that may
    see no key is zero.

    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> rows, mask = torch.tensor([[2]]), torch.ones(1, 1, 1, 6, dtype=torch.bool)
    >>> read = layer_attention_rows([q, q], [k, k], RowMask.of(mask, rows, torch.float32))
    >>> round(float(read.sum()), 4)
    2.0
    """
    scale = queries[0].shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return _LayerRows.apply(mask, scale, dtype or keys[0].dtype, len(queries), *queries, *keys)


def select_columns(read: Tensor, columns: Tensor | slice) -> Tensor:
    """Columns of a (B, R, N) tensor: (B, C) int64 positions, negative ones zero, or a slice of step 1."""
    if isinstance(columns, slice):
        return read[..., columns]
    index = columns.clamp(min=0)[:, None].expand(-1, read.shape[1], -1)
    return read.gather(2, index).masked_fill((columns < 0)[:, None], 0.0)


class _Part(NamedTuple):
    """What is computed at a time."""

    layers: slice
    samples: slice
    groups: slice
    rows: slice


def _cuts(size: int, step: int) -> Iterator[slice]:
    for first in range(0, size, max(1, step)):
        yield slice(first, min(first + max(1, step), size))


def _parts(layers: int, batch: int, groups: int, rows: int, scores: int) -> Iterator[_Part]:
    """Cut the layers, or where one is too large its samples, its key heads, its rows.

    ``scores`` is the number of scores of one row of one key head.
    """
    sizes, steps = (layers, batch, groups, rows), []
    room = max(1, CHUNK_SCORES // max(1, scores))
    for size in reversed(sizes):
        steps.append(min(size, room))
        room = room // size if size and room >= size else 1
    for layer in _cuts(layers, steps[3]):
        for sample in _cuts(batch, steps[2]):
            for group in _cuts(groups, steps[1]):
                for row in _cuts(rows, steps[0]):
                    yield _Part(layer, sample, group, row)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    # Samples come first: sums over layers and heads then run over neighbouring dimensions.
    return tensors[0][:, None] if len(tensors) == 1 else torch.stack(list(tensors), dim=1)


class _Layers:
    """The chosen rows' queries and all keys of some layers, and products of parts of them."""

    def __init__(
        self, picked: Sequence[Tensor], keys: Sequence[Tensor], mask: RowMask, scale: float, kind: torch.dtype
    ) -> None:
        self.picked, self.keys, self.mask, self.scale, self.kind = picked, keys, mask, scale, kind
        self.dtype = _wide(kind)
        self.batch, self.heads, self.rows, self.width = picked[0].shape
        self.groups = keys[0].shape[1]
        self.members = self.heads // self.groups
        self.span = slice(*mask.keys)

    def parts(self) -> Iterator[_Part]:
        scores = self.members * (self.span.stop - self.span.start)
        return _parts(len(self.keys), self.batch, self.groups, self.rows, scores)

    def factors(self, part: _Part) -> tuple[Tensor, Tensor]:
        """(b * l * h, G * r, D) scaled queries and (b * l * h, n, D) keys."""
        heads = slice(part.groups.start * self.members, part.groups.stop * self.members)
        query, key = _stacked(self.picked[part.layers]), _stacked(self.keys[part.layers])
        query, key = query[part.samples, :, heads, part.rows], key[part.samples, :, part.groups, self.span]
        query = query.to(self.kind).to(self.dtype) * self.scale
        key = key.to(self.kind).to(self.dtype)
        size = query.shape[0] * query.shape[1] * (part.groups.stop - part.groups.start)
        return query.reshape(size, -1, self.width), key.reshape(size, -1, self.width)

    def probabilities(self, part: _Part, query: Tensor, key: Tensor) -> Tensor:
        """(b, l, h, G, r, n)."""
        bias = self.mask.bias[part.samples, :, part.rows, self.span]
        scores = torch.bmm(query, key.transpose(1, 2))
        layers, groups = part.layers.stop - part.layers.start, part.groups.stop - part.groups.start
        scores = scores.view(len(bias), layers, groups, self.members, *bias.shape[2:]).add_(
            self._of_heads(bias, part)
        )
        found = scores.softmax(dim=-1)
        if self.mask.blind is not None:
            found.masked_fill_(self._of_heads(self.mask.blind[part.samples, :, part.rows], part), 0.0)
        return found

    def _of_heads(self, values: Tensor, part: _Part) -> Tensor:
        """(b, 1 or Hq, r, ..) as (b, 1, 1 or h, 1 or G, r, ..)."""
        if values.shape[1] == 1:
            return values[:, :, None, None]
        return values.unflatten(1, (1, self.groups, self.members))[:, :, part.groups]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LayerRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mask: RowMask, scale: float, dtype: torch.dtype, count: int, *tensors: Tensor
    ) -> Tensor:
        queries, keys = tensors[:count], tensors[count:]
        picked = [_pick(query, mask.rows) for query in queries]
        ctx.save_for_backward(*picked, *keys)
        ctx.options = mask, scale, dtype
        ctx.strides = [query.stride() for query in queries]
        ctx.kinds = queries[0].dtype, keys[0].dtype
        layers = _Layers(picked, keys, mask, scale, dtype)
        out = keys[0].new_zeros(*mask.rows.shape, keys[0].shape[2], dtype=layers.dtype)
        with torch.autocast(out.device.type, enabled=False):
            for part in layers.parts():
                found = layers.probabilities(part, *layers.factors(part))
                out[part.samples, part.rows, layers.span] += found.sum(dim=(1, 2, 3))
        return out.div_(layers.heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mask, scale, dtype = ctx.options
        count = len(ctx.strides)
        picked, keys = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        layers = _Layers(picked, keys, mask, scale, dtype)
        with torch.autocast(grads[0].device.type, enabled=False):
            grad_picked, grad_keys = _gradients(layers, grads[0].to(layers.dtype) / layers.heads)
            grad_queries = _placed(grad_picked, mask.rows, keys[0].shape[2])
        return (
            None,
            None,
            None,
            None,
            *grad_queries.to(ctx.kinds[0]).unbind(0),
            *grad_keys.to(ctx.kinds[1]).unbind(1),
        )


def _gradients(layers: _Layers, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the picked queries (B, L, Hq, R, D) and of the keys (B, L, Hkv, N, D), given that of the rows."""
    count = len(layers.keys)
    grad_picked = grad.new_empty(layers.batch, count, *layers.picked[0].shape[1:])
    grad_keys = grad.new_zeros(layers.batch, count, *layers.keys[0].shape[1:])
    for part in layers.parts():
        query, key = layers.factors(part)
        found = layers.probabilities(part, query, key)
        direct = found * grad[part.samples, None, None, None, part.rows, layers.span]
        slope = direct.addcmul_(found, direct.sum(dim=-1, keepdim=True), value=-1)
        slope = slope.view(*query.shape[:2], key.shape[1])
        heads = slice(part.groups.start * layers.members, part.groups.stop * layers.members)
        target = grad_picked[part.samples, part.layers, heads, part.rows]
        target.copy_(torch.bmm(slope, key).mul_(layers.scale).view(target.shape))
        target = grad_keys[part.samples, part.layers, part.groups, layers.span]
        target += torch.bmm(slope.transpose(1, 2), query).view(target.shape)
    return grad_picked, grad_keys


def _pick(query: Tensor, rows: Tensor) -> Tensor:
    if len(rows) == 1:
        return query.index_select(2, rows[0])
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


def _placed(grad_picked: Tensor, rows: Tensor, length: int) -> Tensor:
    """(L, B, Hq, N, D): the gradients of the picked queries at their rows, which may repeat."""
    batch, layers, heads, _, width = grad_picked.shape
    # Strided as queries are, which come from (B, N, Hq, D).
    whole = grad_picked.new_zeros(layers, batch, length, heads, width).transpose(2, 3)
    for sample, row in enumerate(rows):
        whole[:, sample].index_add_(2, row, grad_picked[sample])
    return whole
