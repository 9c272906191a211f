"""Which rows, keys and columns one call of ``attention_rows`` reads, in plain torch."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call


class Reading(NamedTuple):
    """Which rows and columns are read, and which keys the rows see. All layers share it."""

    rows: Tensor
    """(B, R) query positions, 0 for padding."""
    valid: Tensor | None
    """(B, R) bool, False for padding; None if no row is padding."""
    limits: Tensor | None
    """(B, R, 2): first and one past the last key position, within each part, that a row sees."""
    key_mask: Tensor | None
    """(B, Nk) bool, True if a key may be seen."""
    mask: Tensor | None
    """(B, 1 or Hq, R, Nk) bool, or float that is added to the scores."""
    sinks: Tensor | None
    """(L or 1, Hq) additional logits in the softmax of every row."""
    window: slice
    """The keys that are read; no row sees another."""
    columns: slice
    """Positions of a part that are read."""
    listed: Tensor | None
    """(B, C) chosen columns, counted from the start of ``columns``; negative for padding."""
    softmax_scale: float
    fold: int
    mean: bool
    softcap: float

    @property
    def inside(self) -> tuple[slice, slice]:
        """The overlap of ``columns`` and the window, counted from the start of each."""
        first = 0 if self.fold > 1 else self.window.start
        end = self.columns.stop if self.fold > 1 else self.window.stop
        low = min(max(self.columns.start, first), self.columns.stop)
        high = max(low, min(self.columns.stop, end))
        start = self.columns.start
        return slice(low - start, high - start), slice(low - first, high - first)

    def bias(self, samples: slice, rows: slice, dtype: torch.dtype) -> Tensor | None:
        """(b, 1 or Hq, r, n), added to the scores of the window; -inf where a key is hidden."""
        hidden = []
        if self.valid is not None:
            hidden.append(~self.valid[samples, None, rows, None])
        if self.limits is not None:
            limits = self.limits[samples, None, rows]
            window, device = self.window, limits.device
            length = (window.stop - window.start) // self.fold
            position = torch.arange(window.start, window.start + length, device=device).repeat(self.fold)
            hidden.append((position < limits[..., :1]) | (position >= limits[..., 1:]))
        if self.key_mask is not None:
            hidden.append(~self.key_mask[samples, None, None, self.window])
        bias: Tensor | float = 0.0
        if self.mask is not None:
            mask = self.mask[samples, :, rows, self.window]
            hidden.append(~allowed(mask))
            bias = 0.0 if mask.dtype == torch.bool else mask.to(dtype)
        if not hidden:
            return None
        blocked = functools.reduce(torch.bitwise_or, hidden)
        bias = torch.where(blocked, -math.inf, bias).to(dtype)
        return bias.expand(*bias.shape[:3], self.window.stop - self.window.start)

    def chosen(self, dense: Tensor, samples: slice) -> Tensor:
        """The listed columns of (b, h, r, columns)."""
        if self.listed is None:
            return dense
        index = self.listed[samples, None, None]
        found = dense.gather(-1, index.clamp(min=0).expand(*dense.shape[:-1], -1))
        return found.masked_fill_(index < 0, 0)

    def spread(self, grad: Tensor, samples: slice) -> Tensor:
        """The transpose of :meth:`chosen`; values of equal columns are added."""
        if self.listed is None:
            return grad
        index = self.listed[samples]
        grad = grad.masked_fill(index[:, None, None] < 0, 0)
        dense = grad.new_zeros(*grad.shape[:-1], self.columns.stop - self.columns.start)
        for one, place, given in zip(dense, index.clamp(min=0), grad, strict=True):
            one.index_add_(-1, place, given)
        return dense


def row_limits(
    rows: Tensor, queries: int, keys: int, causal: bool, key_range: Tensor | None
) -> Tensor | None:
    """(B, R, 2): first and one past the last key of a part that a row sees; None if all rows see all keys."""
    if not causal:
        return key_range
    last = rows + (1 + keys - queries)
    if key_range is None:
        return torch.stack([torch.zeros_like(last), last], -1)
    return torch.stack([key_range[..., 0], key_range[..., 1].minimum(last)], -1)


def reading_of(call: Call, mask: Tensor | None = None) -> Reading:
    """The reading of a call; ``mask`` is for calls without a bias."""
    if call.bias is not None:
        mask = call.bias.expand(-1, -1, -1, call.key.shape[2])
    rows, own, queries = call.rows, call.own, call.query.shape[2]
    valid = (rows >= 0) & (rows < queries)
    limits, first, end = row_limits(rows, queries, own, call.causal, call.key_range), 0, call.key.shape[2]
    start, stop, index = call.start, call.stop, call.columns
    if index is not None:
        index, start, stop = index.masked_fill((index < 0) | (index >= own), -1), 0, own
    rows = torch.where(valid, rows, 0)
    # Elsewhere reading values would stall the device.
    if rows.device.type == "cpu":
        first, end = _window(call, valid, limits, mask)
        if index is not None:
            start = int(torch.where(index < 0, own, index).min()) if index.numel() else 0
            stop = int(index.max()) + 1 if index.numel() else 0
            start = min(start, stop)
            index = index - start
    known = None if rows.device.type == "cpu" and bool(valid.all()) else valid
    if mask is not None:
        mask = mask.expand(*rows.shape[:1], -1, rows.shape[1], -1)
    sinks = None if call.sinks is None else call.sinks.view(-1, call.query.shape[1])
    limited = limits, call.key_mask, mask, sinks
    read = slice(first, end), slice(start, stop), index
    return Reading(rows, known, *limited, *read, call.softmax_scale, call.fold, call.mean, call.softcap)


def _window(call: Call, valid: Tensor, limits: Tensor | None, mask: Tensor | None) -> tuple[int, int]:
    """First and one past the last key that at least one row sees."""
    first, end = 0, call.key.shape[2]
    if call.fold > 1:
        return first, end
    if limits is not None:
        low, high = limits.unbind(-1)
        seeing = valid & (low < high)
        some = bool(seeing.any())
        first = max(0, int(torch.where(seeing, low, end).min())) if some else end
        end = min(end, int(torch.where(seeing, high, 0).max())) if some else 0
    for seen in (call.key_mask, None if mask is None else allowed(mask)):
        if seen is not None:
            places = seen.flatten(0, -2).any(0).nonzero()
            first = max(first, int(places[0])) if len(places) else end
            end = min(end, int(places[-1]) + 1) if len(places) else first
    return first, max(first, end)


def allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)
