"""Entries and their sums in plain torch, a few rows at a time: any dtype, width and length."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..attention_rows.reading import allowed
from .call import APART, Call, Diagonals

CHUNK_ELEMENTS = 1 << 20
"""Maximum number of entries held at a time, but at least one row of the heads that share a key head."""


class _Block(NamedTuple):
    """Some rows of the query heads that share a key head, and the keys that any of them may see."""

    sample: int
    group: int
    heads: slice
    rows: slice
    keys: slice
    query: Tensor
    """(G, r, D), scaled."""
    key: Tensor
    """(c, D), zero where no row sees it."""
    places: Tensor
    """(c,) positions of the keys."""
    seen: Tensor | None
    """(r, c), (1, c) or (G, r, c); None where every row sees every key."""
    bent: Tensor | None
    """(G, r, c) hyperbolic tangents of the scores, where these have a soft cap."""
    entries: Tensor
    """(G, r, c)."""


def _blocks(call: Call) -> Iterator[_Block]:
    dtype = checks.accumulate_dtype(call.query.dtype)
    batch, _, rows, width = call.query.shape
    keys, device = call.key.shape[2], call.query.device
    step = max(1, CHUNK_ELEMENTS // max(1, call.groups * keys))
    for sample in range(batch):
        places = (
            call.start + torch.arange(keys, device=device) if call.places is None else call.places[sample]
        )
        for group in range(call.key.shape[1]):
            heads = slice(group * call.groups, (group + 1) * call.groups)
            whole = call.key[sample, group].to(dtype)
            if call.places is not None:
                # Zero times NaN would be NaN in the gradient of a query.
                whole = whole.masked_fill(places[:, None] < 0, 0)
            for begin in range(0, rows, step):
                part = slice(begin, min(begin + step, rows))
                window = _window(call, sample, part)
                if window.start >= window.stop:
                    continue
                query = call.query[sample, heads, part].to(dtype) * call.softmax_scale
                scores = (query.reshape(-1, width) @ whole[window].T).view(*query.shape[:2], -1)
                bent = None
                if call.softcap:
                    bent = scores.div_(call.softcap).tanh_()
                    scores = bent * call.softcap
                hidden = _hidden(call, sample, places[window], part)
                if call.bias is not None:
                    bias = call.bias.expand(call.map_shape)[sample, heads, part, window]
                    scores += bias
                    hidden.append(~allowed(bias))
                entries = scores.sub_(call.lse[sample, heads, part, None]).exp_()
                seen = ~functools.reduce(torch.bitwise_or, hidden) if hidden else None
                if seen is not None:
                    entries.masked_fill_(~seen, 0)
                place = sample, group, heads, part, window
                yield _Block(*place, query, whole[window], places[window], seen, bent, entries)


def _window(call: Call, sample: int, rows: slice) -> slice:
    """The range of keys that at least one of the rows sees, as far as the order of the keys tells it."""
    first, end = 0, call.key.shape[2]
    # Elsewhere reading values would stall the device.
    if call.places is None and call.key_range is not None and call.key_range.device.type == "cpu":
        low, high = call.key_range[sample, rows].unbind(-1)
        first = max(0, int(torch.where(low < high, low, call.start + end).min()) - call.start)
        end = min(end, int(high.max()) - call.start)
    if call.places is None and call.left >= 0:
        first = max(first, rows.start + call.shift - call.left - call.start)
    if call.places is None and call.right >= 0:
        end = min(end, rows.stop + call.shift + call.right - call.start)
    return slice(first, max(first, end))


def _hidden(call: Call, sample: int, places: Tensor, rows: slice) -> list[Tensor]:
    row = torch.arange(rows.start, rows.stop, device=places.device)[:, None] + call.shift
    hidden = [] if call.places is None else [places[None] < 0]
    if call.left >= 0:
        hidden.append(places[None] < row - call.left)
    if call.right >= 0:
        hidden.append(places[None] > row + call.right)
    if call.key_range is not None:
        low, high = call.key_range[sample, rows].split(1, -1)
        hidden.append((places[None] < low) | (places[None] >= high))
    return hidden


def columns(call: Call, mean: bool) -> Tensor:
    """All entries: (B, R, C) mean over the heads, or (B, Hq, R, C)."""
    batch, heads, *size = call.map_shape
    dtype = checks.accumulate_dtype(call.query.dtype)
    out = call.query.new_zeros((batch, 1 if mean else heads, *size), dtype=dtype)
    for block in _blocks(call):
        if mean:
            out[block.sample, 0, block.rows, block.keys] += block.entries.sum(0)
        else:
            out[block.sample, block.heads, block.rows, block.keys] = block.entries
    return out[:, 0] / heads if mean else out


def sums(call: Call, over_rows: bool, largest: bool) -> Tensor:
    """Sum or maximum of the entries, over the rows (B, Hq, C) or over the keys (B, Hq, R)."""
    batch, heads, rows, keys = call.map_shape
    dtype = checks.accumulate_dtype(call.query.dtype)
    out = call.query.new_zeros((batch, heads, keys if over_rows else rows), dtype=dtype)
    for block in _blocks(call):
        target = out[block.sample, block.heads, block.keys if over_rows else block.rows]
        axis = 1 if over_rows else 2
        if largest:
            torch.maximum(target, block.entries.amax(axis), out=target)
        else:
            target += block.entries.sum(axis)
    return out


def row_statistics(call: Call, diagonals: Diagonals, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, distance and share on the diagonals of every row's attention, each (B, Hq, R)."""
    entropy, distance, along = (
        torch.zeros_like(call.lse, memory_format=torch.contiguous_format) for _ in range(3)
    )
    for block in _blocks(call):
        place = block.sample, block.heads, block.rows
        row = torch.arange(block.rows.start, block.rows.stop, device=entropy.device)[:, None] + call.shift
        # Keys that are listed, as those of several parts are, are in every block.
        token = block.keys.start + torch.arange(block.entries.shape[2] // fold, device=row.device)
        entries = block.entries
        if fold > 1:
            entries = entries.unflatten(-1, (fold, len(token))).sum(-2)
        distance[place] = (entries * (row - token).abs()).sum(-1)
        if diagonals.period:
            near = (diagonals.places(row, -APART) - diagonals.places(token, APART)).abs() <= diagonals.band
            along[place] = torch.where(near, entries, 0).sum(-1)
        entropy[place] = -torch.xlogy(entries, entries, out=entries).sum(-1)
    return entropy, distance, along if diagonals.period else along.new_empty(0)


def backward(grad: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and logsumexp, from the (B, Hq, R, C) gradient of the entries."""
    dtype = checks.accumulate_dtype(call.query.dtype)
    grad_query, grad_key, grad_lse = (
        torch.zeros(item.shape, dtype=dtype, device=item.device) for item in call[:3]
    )
    for block in _blocks(call):
        place = block.sample, block.heads, block.rows
        change = block.entries.mul_(grad[*place, block.keys])
        if block.seen is not None:
            change.masked_fill_(~block.seen, 0)
        grad_lse[place] = -change.sum(-1)
        if block.bent is not None:
            change.mul_(1 - block.bent.square_())
        grad_query[place] = (change.flatten(0, 1) @ block.key).view(block.query.shape) * call.softmax_scale
        grad_key[block.sample, block.group, block.keys] += change.flatten(0, 1).T @ block.query.flatten(0, 1)
    return grad_query.to(call.query.dtype), grad_key.to(call.key.dtype), grad_lse
