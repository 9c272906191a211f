"""``attention_rows`` as a composite of torch ops: the CPU path, and what any device can run.

Its memory is that of a block: query heads of some key heads x rows x keys, at most about
:data:`CHUNK_ELEMENTS` scores where one key head and row allow it. The backward computes the block again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

CHUNK_ELEMENTS = 1 << 20
"""Scores held at a time."""


class _Block(NamedTuple):
    """Scores of some chosen rows of the query heads of some key heads, G query heads a key head."""

    sample: int
    heads: slice
    """Query heads, h * G of them."""
    groups: slice
    """Key heads, h of them."""
    chosen: slice
    """Places along the R axis."""
    rows: Tensor
    """(r,) query positions, 0 where invalid."""
    valid: Tensor
    """(r,) whether the row is one."""
    query: Tensor
    """(h, G * r, D), scaled."""
    key: Tensor
    """(h, Nk, D)."""
    scores: Tensor
    """(h, G, r, Nk), -inf where a key may not be seen."""


def _hidden(
    row: Tensor, queries: int, own: int, fold: int, causal: bool, mask: Tensor | None, ranges: Tensor | None
) -> Tensor | None:
    """True, (r, Nk) or (Nk,), where a key may not be seen; None where all may."""
    hidden = [] if mask is None else [~mask]
    position = torch.arange(own, device=row.device).repeat(fold)
    if causal:
        hidden.append(position > (row + own - queries)[:, None])
    if ranges is not None:
        hidden.append((position < ranges[:, :1]) | (position >= ranges[:, 1:]))
    return functools.reduce(torch.bitwise_or, hidden) if hidden else None


def _blocks(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    fold: int,
    key_range: Tensor | None,
) -> Iterator[_Block]:
    dtype = checks.accumulate_dtype(query.dtype)
    (batch, _, queries, width), (heads, keys) = query.shape, key.shape[1:3]
    groups, own = query.shape[1] // heads, key.shape[2] // fold
    step = min(rows.shape[1], max(1, CHUNK_ELEMENTS // max(1, groups * keys)))
    together = max(1, CHUNK_ELEMENTS // max(1, groups * step * keys))
    for sample in range(batch):
        for first in range(0, rows.shape[1], max(1, step)):
            chosen = slice(first, min(first + step, rows.shape[1]))
            row = rows[sample, chosen]
            valid = (row >= 0) & (row < queries)
            row = torch.where(valid, row, 0)
            mask = None if key_mask is None else key_mask[sample]
            ranges = None if key_range is None else key_range[sample, chosen]
            hidden = _hidden(row, queries, own, fold, causal, mask, ranges)
            for group in range(0, heads, together):
                some = slice(group, min(group + together, heads))
                members = slice(some.start * groups, some.stop * groups)
                picked = query[sample, members].index_select(1, row).to(dtype) * scale
                picked = picked.reshape(some.stop - some.start, -1, width)
                keys_here = key[sample, some].to(dtype)
                scores = (picked @ keys_here.transpose(1, 2)).view(-1, groups, len(row), keys)
                if hidden is not None:
                    scores.masked_fill_(hidden, -math.inf)
                yield _Block(sample, members, some, chosen, row, valid, picked, keys_here, scores)


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


def forward(
    query, key, rows, columns, start, stop, scale, causal, key_mask, fold, mean, key_range=None
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of ``attention_rows``, with the arguments of its op but the backend."""
    dtype = checks.accumulate_dtype(query.dtype)
    batch, heads = query.shape[:2]
    width = stop - start if columns is None else columns.shape[1]
    size = (batch, rows.shape[1], width) if mean else (batch, heads, rows.shape[1], width)
    out = query.new_zeros(size, dtype=dtype)
    lse = query.new_full((batch, heads, rows.shape[1]), -math.inf, dtype=dtype)
    rest = torch.zeros_like(lse)
    own = key.shape[2] // fold
    if not own:
        return out, lse, rest
    for block in _blocks(query, key, rows, scale, causal, key_mask, fold, key_range):
        top = block.scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0)
        weights = block.scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        share = torch.where(total > 0, 1 / total, 0)
        top, logarithm = top[..., 0], total[..., 0].log()
        place = block.sample, block.heads, block.chosen
        both = top + logarithm
        lse[place] = both.flatten(0, 1)
        rest[place] = torch.where(total[..., 0] > 0, top - both + logarithm, 0).flatten(0, 1)
        reader = _Columns(columns, block.sample, start, stop, own, fold)
        mass = sum(reader.read(weights, part) for part in reader.parts) * share
        assert isinstance(mass, Tensor)
        mass.masked_fill_(~block.valid[:, None], 0)
        if reader.valid is not None:
            mass.masked_fill_(~reader.valid, 0)
        if mean:
            out[block.sample, block.chosen] += mass.sum((0, 1))
        else:
            out[block.sample, block.heads, block.chosen] = mass.flatten(0, 1)
    return out.div_(heads) if mean else out, lse, rest


def backward(
    grad,
    query,
    key,
    rows,
    columns,
    start,
    stop,
    scale,
    causal,
    key_mask,
    fold,
    mean,
    lse,
    rest,
    key_range=None,
) -> tuple[Tensor, Tensor]:
    """The backward of ``attention_rows``, with the arguments of its op but the backend."""
    dtype = checks.accumulate_dtype(query.dtype)
    heads, own = query.shape[1], key.shape[2] // fold
    grad_query = torch.zeros_like(query)
    grad_key = torch.zeros_like(key, dtype=dtype)
    if not own:
        return grad_query, grad_key.to(key.dtype)
    for block in _blocks(query, key, rows, scale, causal, key_mask, fold, key_range):
        shape = block.scores.shape[:3]
        total = lse[block.sample, block.heads, block.chosen].view(shape)
        shift = total.masked_fill(total == -math.inf, 0)[..., None]
        weights = block.scores.sub_(shift).exp_()
        share = rest[block.sample, block.heads, block.chosen].view(*shape, 1).neg().exp()
        if mean:
            given = grad[block.sample, block.chosen].to(dtype) / heads
        else:
            given = grad[block.sample, block.heads, block.chosen].to(dtype).unflatten(0, shape[:2])
        given = given.masked_fill(~block.valid[:, None], 0)
        reader = _Columns(columns, block.sample, start, stop, own, fold)
        if reader.valid is not None:
            given = given.masked_fill(~reader.valid, 0)
        given = given * share
        moved = [reader.read(weights, part) * given for part in reader.parts]
        slope = weights.mul_(-share * sum(item.sum(-1, keepdim=True) for item in moved))
        for part, item in zip(reader.parts, moved, strict=True):
            reader.add(slope, part, item)
        slope = slope.flatten(1, 2)
        grad_key[block.sample, block.groups].baddbmm_(slope.transpose(1, 2), block.query)
        picked = (slope @ block.key).mul_(scale).view(shape[0] * shape[1], shape[2], -1)
        # Equal rows are added in full precision first.
        position, place = block.rows.unique(return_inverse=True)
        added = picked.new_zeros(picked.shape[0], len(position), picked.shape[2]).index_add_(1, place, picked)
        grad_query[block.sample, block.heads].index_add_(1, position, added.to(query.dtype))
    return grad_query, grad_key.to(key.dtype)
