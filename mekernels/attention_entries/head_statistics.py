"""Statistics that tell kinds of heads apart, without the map: entropy, distance, shares of some keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from ..attention_rows.op import packed_range
from . import composite
from .call import Call, Diagonals
from .op import LIMITS, attention_sums_op, checked, columns_of, window_of


class HeadStatistics(NamedTuple):
    """Means over the rows of every head, each (B, Hq); what :func:`head_statistics` returns.

    Example:
        >>> import torch, mekernels
        >>> query = torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, query, query)
        >>> mekernels.head_statistics(query, query, lse).entropy.shape
        torch.Size([1, 2])
    """

    entropy: Tensor
    """Entropy of a row's attention in nats: 0 if the row looks at one key, log(n) if evenly at n keys."""
    distance: Tensor
    """Number of tokens between a row and its keys, weighted by attention."""
    sink: Tensor
    """Share of a row's attention on the sinks."""
    diagonal: Tensor | None = None
    """Share of a video token's attention on its own place in all frames; None without a period."""


def head_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    sinks: Tensor | slice = slice(0, 1),
    video: slice | None = None,
    period: int | None = None,
    diagonal_width: int = 0,
    rows: slice | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_range: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fold: int = 1,
) -> HeadStatistics:
    """Entropy, mean distance, share of sinks and of temporal diagonals of every head, in one pass.

    A row and a key of a video lie on a temporal diagonal if they have the same place in their frames.
    Token t of the video has the place ``(t - video.start) % period``. The places p and q count as the same if
    ``abs(p - q) <= diagonal_width``, without a wrap from the last place of a frame to the first.

    Args:
        query, key, lse, softmax_scale, causal, key_mask, window, softcap, cu_seqlens, fold: as in
            :func:`mekernels.attention_columns`. With ``fold`` the statistics are those of the folded map.
        sinks: keys that count as sinks, (B, C) int64 positions, -1 is padding, or a slice; the first key by
            default. A position that is given twice counts once.
        video: the tokens of one video, frame by frame, a slice of step 1 of the key positions of a part; all
            by default. Needs a period.
        period: tokens from a place of one frame to the same place of the next: the tokens of a frame, and of
            the separator between frames if there is one. None: no diagonal share is computed.
        diagonal_width: see above; 0 for the exact place. Needs a period.
        rows: the window of rows to average, a slice of step 1; all by default.
        key_range: (B, R, 2) for the window of rows; otherwise as in :func:`mekernels.attention_columns`.
        bias: (B or 1, Hq or 1, R or 1, Nk or 1) for the window of rows; otherwise as in
            :func:`mekernels.attention_columns`.

    Returns:
        Entropy, distance, sink share and, with a period, diagonal share, each (B, Hq), float64 for float64
        input and float32 otherwise. Rows that see no key are left out, and the diagonal share is the mean
        over the rows of the video; a statistic without any row is 0. The position of row i is i + n - Nq,
        n the keys of a part, as with ``causal``. Learned sinks are not keys: no statistic counts them. The
        diagonal share counts the keys of all frames, and the row's own frame is one of them. With
        ``window=(period, period)`` it counts the neighbouring frames only, with ``window=(0, 0)`` the row's
        own place only. Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: entropy and distance of heads as in "Analyzing the Structure of Attention" (Vig and Belinkov,
    2019, arXiv 1906.04284); sinks as in "Efficient Streaming Language Models with Attention Sinks" (Xiao et
    al., ICLR 2024, arXiv 2309.17453); diagonals as in the head selection of "MotionEnhancer" (CVPR 2026,
    arXiv 2606.06853): the diagonal share is like the numerator of DFC, but without the square and for one
    layer.

    Example:
        >>> import torch, mekernels
        >>> query, key = torch.zeros(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, key, key)
        >>> found = mekernels.head_statistics(query, key, lse)  # every row looks evenly at ten keys
        >>> found.entropy.exp().round().tolist(), round(float(found.sink[0, 0]), 3)
        ([[10.0, 10.0]], 0.1)

        If the ten keys are five frames of two places, a row's own place is half of the keys.

        >>> round(float(mekernels.head_statistics(query, key, lse, period=2).diagonal[0, 0]), 3)
        0.5
    """
    limits = softmax_scale, causal, window, softcap
    query, key, options = checked("head_statistics", query, key, key_mask, *limits)
    checks.logsumexp(lse, query)
    own, chosen = checks.fold(fold, key.shape[2]), checks.window("rows", rows, query.shape[2])
    checks.key_range(key_range, query, chosen.stop - chosen.start)
    key_range = packed_range(cu_seqlens, key_range, query, own, chosen)
    size = chosen.stop - chosen.start, key.shape[2]
    checks.bias(bias, query, size, meaning="(batch, heads, rows, keys), or 1 of any")
    diagonals = _diagonals(video, period, diagonal_width, own)
    index, *between = checks.columns(sinks, query, own, "sinks")
    if index is not None:
        checks.index_values("sinks", index, own)
        index = index.sort(-1).values
        repeated = index.diff(dim=-1, prepend=index.new_full((len(index), 1), -2)) == 0
        sinks = index = index.masked_fill(repeated, -1)
    with torch.no_grad():
        if backends.active() == "reference":
            named: dict[str, Any] = dict(zip(LIMITS, limits, strict=True))
            named |= {"key_mask": key_mask, "bias": bias}
            named |= {"video": video, "period": period, "diagonal_width": diagonal_width}
            named |= {"key_range": key_range, "fold": fold}
            found = backends.by_reference(
                reference.head_statistics, query, key, lse, sinks=sinks, rows=chosen, **named
            )
            return HeadStatistics(*(item.to(lse.dtype) for item in found))
        given = key_mask, bias, key_range, fold
        part = window_of(query, key, lse, chosen, slice(0, own), options, *given)
        if index is None:
            index = torch.arange(*between, device=query.device).expand(len(query), -1)
        entropy, distance, along = attention_row_statistics_op(part, diagonals, fold)
        on_sinks = attention_sums_op(columns_of(part, index, fold), False, False)
        seeing = _seeing(part, own)
        found = [_mean(item, seeing) for item in (entropy, distance, on_sinks)]
        if period is not None:
            place = part.shift + torch.arange(size[0], device=query.device)
            found.append(_mean(along, seeing & (place >= diagonals.first) & (place < diagonals.stop)))
        return HeadStatistics(*found)


def _diagonals(video: slice | None, period: int | None, width: int, keys: int) -> Diagonals:
    """The checked diagonals."""
    checks.number("diagonal_width", width, 0)
    if period is None:
        if video is not None or width:
            raise ValueError(
                "period must be given with video or diagonal_width: the number of tokens of a frame"
            )
        return Diagonals(0, 0, 0, 0)
    checks.number("period", period, 1)
    tokens = checks.window("video", video, keys)
    # No two places of the video are further apart than the video is long.
    period = min(period, max(1, tokens.stop - tokens.start))
    return Diagonals(tokens.start, tokens.stop, period, min(width, period))


def _seeing(part: Call, keys: int) -> Tensor:
    """(B, Hq, R): whether a row sees a key. The logsumexp does not show this: a sink makes it finite."""
    row = part.shift + torch.arange(part.query.shape[2], device=part.query.device)
    low = row - part.left if part.left >= 0 else torch.zeros_like(row)
    high = row + part.right + 1 if part.right >= 0 else torch.full_like(row, keys)
    low, high = (item.expand(len(part.query), -1).clamp(0, keys) for item in (low, high))
    if part.key_range is not None:
        low, high = low.maximum(part.key_range[..., 0]), high.minimum(part.key_range[..., 1])
    shown = None if part.bias is None else ~(part.bias <= torch.finfo(part.bias.dtype).min / 2)
    if part.places is None and shown is None:
        seen = (low < high)[:, None]
    else:
        # The number of keys that are shown before each position. Hidden keys are counted at 0, before all.
        places = torch.arange(keys, device=low.device)[None] if part.places is None else part.places
        shown = places.new_ones(1, 1, 1, 1) if shown is None else shown
        size = len(low), *shown.shape[1:3], places.shape[1]
        before = torch.zeros(*size[:3], keys + 1, dtype=torch.int32, device=low.device)
        before.scatter_add_(3, (places + 1)[:, None, None].expand(size).long(), shown.expand(size).int())
        before = before.cumsum(3, dtype=torch.int32)
        low, high = (item[:, None, None] if size[2] == 1 else item[:, None, :, None] for item in (low, high))
        low, high = (before.gather(3, item.expand(-1, size[1], -1, -1).long()) for item in (low, high))
        seen = (high > low).flatten(2)
    return seen & (part.lse != -torch.inf)


def _mean(rows: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen of (B, Hq, R) rows, 0 if there are none."""
    return torch.where(chosen, rows, 0).sum(-1) / chosen.sum(-1).clamp(min=1)


def _fake(call: Call, diagonals: Diagonals, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    entropy = call.lse.new_empty(call.lse.shape)
    along = torch.empty_like(entropy) if diagonals.period else entropy.new_empty(0)
    return entropy, torch.empty_like(entropy), along


attention_row_statistics_op = backends.Op("attention_row_statistics", _fake)
"""Entropy, mean distance to the keys and, with a period, share on the diagonals of every row, (B, Hq, R)."""


def _triton(call: Call, diagonals: Diagonals, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    from . import plan

    return plan.row_statistics(call, diagonals, fold)


def _triton_reasons(call: Call, diagonals: Diagonals, fold: int) -> list[str]:
    return launch.reasons(call.query)


op = "attention_row_statistics"
backends.register(op, "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register(op, "torch", composite.row_statistics)
