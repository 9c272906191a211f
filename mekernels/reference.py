"""The naive mathematics of all ops, in plain torch and any float type. Every kernel is tested against it.

Only this file builds whole attention maps. Each function computes in the dtype of its input, so float64 input
gives float64 output. Head selection, token selection and the alignment loss are those of the paper
"MotionEnhancer" (CVPR 2026, arXiv 2606.06853).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import VideoTokens

Grid = tuple[int, int, int]


def hidden_keys(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    key_range: Tensor | None = None,
    fold: int = 1,
) -> Tensor:
    """(B or 1, 1, Nq, Nk) bool, True where a key is hidden; options of :func:`attention_scores`."""
    queries, keys = query.shape[2], key.shape[2] // fold
    hidden = torch.zeros(1, 1, queries, key.shape[2], dtype=torch.bool, device=query.device)
    row = torch.arange(queries, device=query.device)[:, None]
    place = torch.arange(keys, device=query.device).repeat(fold)
    apart = place - (row + keys - queries)
    if causal:
        hidden = hidden | (apart > 0)
    if window is not None:
        left, right = window
        hidden = hidden | ((apart < -left) & (left >= 0)) | ((apart > right) & (right >= 0))
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    if key_range is not None:
        first, end = key_range[:, None].split(1, -1)
        hidden = hidden | (place < first) | (place >= end)
    return hidden


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    key_range: Tensor | None = None,
    fold: int = 1,
) -> Tensor:
    """Scaled scores (B, Hq, Nq, Nk), -inf where a key is not allowed.

    Causal aligns the ends: row i sees key j of each of the ``fold`` parts of n keys when j <= i + n - Nq. A
    window (left, right) limits the keys around i + n - Nq, -1 for no limit. ``key_range`` (B, Nq, 2) holds
    the first key of a part that a row sees, and the end. A soft cap bends the scores. A bias is added; it
    hides a key where it is at most half the lowest number of its dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * (query @ key.transpose(-1, -2))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    given = {"key_mask": key_mask, "key_range": key_range}
    hidden = hidden_keys(query, key, causal=causal, window=window, fold=fold, **given)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
        hidden = hidden | (bias <= torch.finfo(bias.dtype).min / 2)
    return scores.masked_fill(hidden, -math.inf)


def attention_map(query: Tensor, key: Tensor, *, sinks: Tensor | None = None, **options) -> Tensor:
    """Softmax attention (B, Hq, Nq, Nk); a row without any allowed key is zero.

    Sinks (Hq,) are the logits of one more key of each head; the attention to that key is left out.
    """
    scores = with_sinks(attention_scores(query, key, **options), sinks)
    weights = (scores - scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights[..., : key.shape[2]] / total.masked_fill(total == 0, 1)


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores with a last column of sinks, one sink for each head."""
    if sinks is None:
        return scores
    return torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)


def attention_lse(query: Tensor, key: Tensor, *, sinks: Tensor | None = None, **options) -> Tensor:
    """(B, Hq, Nq) natural logarithm of the sum of exponentials of each row's allowed scores."""
    return with_sinks(attention_scores(query, key, **options), sinks).logsumexp(-1)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Attention output (B, Hq, Nq, Dv) and natural-log logsumexp (B, Hq, Nq)."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return attention_map(query, key, **options) @ value, attention_lse(query, key, **options)


def entry_exponents(query: Tensor, key: Tensor, lse: Tensor, **options) -> Tensor:
    """Logarithms of attention (B, Hq, Nq, Nk) from a given (B, Hq, Nq) logsumexp; -inf for a hidden key.

    Differentiable in all three, as independent variables.
    """
    hidden = hidden_keys(query, key, **{k: v for k, v in options.items() if k in HIDING})
    return (attention_scores(query, key, **options) - lse[..., None]).masked_fill(hidden, -math.inf)


HIDING = ("causal", "key_mask", "window", "key_range", "fold")
"""Options that hide keys."""


def range_of_window(key_range: Tensor | None, rows: slice | None, queries: int) -> Tensor | None:
    """Extend the (B, R, 2) key range of a window of rows to all rows; other rows see no key."""
    if key_range is None:
        return None
    whole = key_range.new_zeros(len(key_range), queries, 2)
    whole[:, rows or slice(None)] = key_range
    return whole


def biased_entries(exponents: Tensor, bias: Tensor | None) -> Tensor:
    """Attention from its logarithms without the bias, which is added here."""
    if bias is None:
        return exponents.exp()
    hidden = bias <= torch.finfo(bias.dtype).min / 2
    return (exponents + bias.to(exponents.dtype)).masked_fill(hidden, -math.inf).exp()


def picked_columns(entries: Tensor, columns: Tensor | slice, hidden: float = 0.0) -> Tensor:
    """Columns (B, C) of (B, Hq, R, Nk); ``hidden`` for padding."""
    if isinstance(columns, slice):
        return entries[..., columns]
    picked = [
        torch.where(column >= 0, item[..., column.clamp(min=0)], hidden)
        for item, column in zip(entries, columns, strict=True)
    ]
    return torch.stack(picked)


def attention_columns(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    columns: Tensor | slice,
    *,
    bias: Tensor | None = None,
    fold: int = 1,
    reduce: str = "mean",
    **options,
) -> Tensor:
    """Chosen columns of all rows, with their bias: (B, Nq, C), or (B, Hq, Nq, C) with ``reduce="none"``."""
    exponents = entry_exponents(query, key, lse, fold=fold, **options)
    parts = exponents.unflatten(-1, (fold, key.shape[2] // fold)).unbind(-2)
    picked = torch.cat([picked_columns(part, columns, -math.inf) for part in parts], -1)
    result = fold_keys(biased_entries(picked, bias), fold)
    return result.mean(1) if reduce == "mean" else result


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    over: str,
    reduce: str = "sum",
    rows: slice | None = None,
    columns: slice | None = None,
    bias: Tensor | None = None,
    key_range: Tensor | None = None,
    fold: int = 1,
    **options,
) -> Tensor:
    """Sum, mean or largest entry over the rows (B, Hq, C) or the columns (B, Hq, R) of a window."""
    options |= {"key_range": range_of_window(key_range, rows, query.shape[2]), "fold": fold}
    exponents = entry_exponents(query, key, lse, **options)[:, :, rows or slice(None)]
    parts = exponents.unflatten(-1, (fold, key.shape[2] // fold))[..., columns or slice(None)]
    attention = fold_keys(biased_entries(parts.flatten(-2), bias), fold)
    axis = -2 if over == "rows" else -1
    if reduce == "max":
        # At least 0, which is what a hidden key has.
        return torch.nn.functional.pad(attention, (0, 0, 0, 1) if over == "rows" else (0, 1)).amax(axis)
    return attention.sum(axis) / (max(1, attention.shape[axis]) if reduce == "mean" else 1)


def head_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    sinks: Tensor | slice,
    rows: slice,
    bias: Tensor | None = None,
    key_range: Tensor | None = None,
    video: slice | None = None,
    period: int | None = None,
    diagonal_width: int = 0,
    fold: int = 1,
    **options,
) -> list[Tensor]:
    """Entropy in nats, distance in tokens, share on the sinks and, with a period, share on the diagonals.

    Each (B, Hq), the mean over rows that see a key; the last over rows of the video. A key of the video is on
    a diagonal of a row of the video if their places, counted in each period of the video, are at most
    ``diagonal_width`` apart.
    """
    queries, own = query.shape[2], key.shape[2] // fold
    options |= {"key_range": range_of_window(key_range, rows, queries), "fold": fold}
    exponents = entry_exponents(query, key, lse, **options)[:, :, rows]
    attention = fold_keys(biased_entries(exponents, bias), fold)
    token = torch.arange(own, device=query.device)
    place = torch.arange(queries, device=query.device)[rows] + own - queries
    apart = (place[:, None] - token).abs()
    entropy, distance = -torch.xlogy(attention, attention).sum(-1), (attention * apart).sum(-1)
    found = [entropy, distance, picked_columns(attention, sinks).sum(-1)]
    # Equal scores have an attention of 0 only where a limit, the mask or the bias hides a key.
    equal = entry_exponents(*map(torch.zeros_like, (query, key, lse)), **options)[:, :, rows]
    hiding = None if bias is None else bias.masked_fill(bias > torch.finfo(bias.dtype).min / 2, 0)
    averaged = [(lse[:, :, rows] != -math.inf) & (biased_entries(equal, hiding) != 0).any(-1)] * 3
    if period is not None:
        first, stop, _ = (video or slice(None)).indices(own)
        of_video, key_of_video = ((item >= first) & (item < stop) for item in (place, token))
        near = ((place[:, None] - first) % period - (token - first) % period).abs() <= diagonal_width
        on_diagonal = of_video[:, None] & key_of_video & near
        found.append(torch.where(on_diagonal, attention, 0).sum(-1))
        averaged.append(averaged[0] & of_video)
    return [
        torch.where(chosen, item, 0).sum(-1) / chosen.sum(-1).clamp(min=1)
        for item, chosen in zip(found, averaged, strict=True)
    ]


def fold_keys(attention: Tensor, fold: int) -> Tensor:
    """Add the ``fold`` equal parts of the key axis: the mass on own keys and on reference keys."""
    return attention.unflatten(-1, (fold, attention.shape[-1] // fold)).sum(-2)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | slice,
    *,
    key_range: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    fold: int = 1,
    reduce: str = "mean",
    **options,
) -> Tensor:
    """Chosen rows and columns of the attention map: (B, R, C), or (B, Hq, R, C) with ``reduce="none"``.

    With ``key_range`` (B, R, 2), each row sees only these positions of every part of the keys. A ``bias``
    (B or 1, Hq or 1, R or 1, Nk) belongs to the chosen rows.
    """
    options |= {"fold": fold}
    if (key_range is not None or bias is not None) and rows.shape[1] > 1:
        maps = []
        for place in range(rows.shape[1]):
            own = {"reduce": reduce, "key_mask": key_mask} | options
            if key_range is not None:
                own["key_range"] = key_range[:, place, None]
            if bias is not None:
                own["bias"] = bias.expand(-1, -1, rows.shape[1], -1)[:, :, place, None]
            maps.append(attention_rows(query, key, rows[:, place, None], columns, **own))
        return torch.cat(maps, -2)
    if key_range is not None and rows.shape[1]:
        position = torch.arange(key.shape[2] // fold, device=key.device).repeat(fold)
        inside = (position >= key_range[:, 0, :1]) & (position < key_range[:, 0, 1:])
        key_mask = inside if key_mask is None else inside & key_mask
    options |= {"key_mask": key_mask, "bias": bias if rows.shape[1] else None}
    attention = fold_keys(attention_map(query, key, **options), fold)
    if isinstance(columns, slice):
        columns = torch.arange(attention.shape[-1], device=query.device)[columns].expand(len(query), -1)
    picked = []
    for item, row, column in zip(attention, rows, columns, strict=True):
        chosen = item[:, row.clamp(min=0)][:, :, column.clamp(min=0)]
        picked.append(torch.where((row >= 0)[:, None] & (column >= 0), chosen, 0))
    result = torch.stack(picked)
    return result.mean(1) if reduce == "mean" else result


def vision_block(attention: Tensor, video: VideoTokens) -> Tensor:
    """The vision-to-vision block (..., S, S) of maps (..., N, N)."""
    return attention[..., video.vision_slice, video.vision_slice]


def diagonal(block: Tensor, video: VideoTokens) -> Tensor:
    """Same-position entries of blocks (..., S, S): [..., f, g, p] is the entry from (f, p) to (g, p)."""
    frames, positions = video.frames, video.positions
    return block.unflatten(-1, (frames, positions)).unflatten(-3, (frames, positions)).diagonal(0, -3, -1)


def diagonal_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    video: VideoTokens,
    *,
    softmax_scale: float | None = None,
    fold: int = 1,
) -> Tensor:
    """Attention between the same position of all frame pairs, (B, H, F, F, P), from a given logsumexp."""
    scores = attention_scores(query, key, softmax_scale=softmax_scale)
    return diagonal(vision_block(fold_keys((scores - lse[..., None]).exp(), fold), video), video)


class Statistics(NamedTuple):
    """The statistics of the pooled maps that head and token selection need."""

    diagonal: Tensor
    """(H, F, F, P) same-position entries."""
    mean_attention: Tensor
    """(H,) mean of the vision-to-vision block, the threshold tau."""
    square_sum: Tensor
    """(H,) sum of all squares of the vision-to-vision block."""
    text_attention: Tensor
    """(H, T, S) text rows over vision columns."""


def motion_statistics(
    maps: Iterable[Tensor], video: VideoTokens, text_rows: Sequence[int] | Tensor | None = None
) -> Statistics:
    """Average folded maps (H, N, N) over all layers and steps; return the statistics of the mean."""
    pooled = torch.stack(list(maps)).mean(0)
    block = vision_block(pooled, video)
    rows = torch.arange(video.length)[video.text_slice] if text_rows is None else torch.as_tensor(text_rows)
    text = pooled[:, rows.to(pooled.device), video.vision_slice]
    return Statistics(diagonal(block, video), block.mean((-1, -2)), block.square().sum((-1, -2)), text)


def run_statistics(above: Tensor) -> tuple[int, int]:
    """Numbers of true entries and of maximal runs of them, over all rows of one boolean matrix."""
    entries = runs = 0
    for row in above.tolist():
        entries += sum(row)
        runs += sum(now and not before for before, now in zip([False, *row], row, strict=False))
    return entries, runs


def temporal_consistency(diagonal: Tensor, threshold: Tensor) -> Tensor:
    """TCS: mean over positions of the mean length of all runs above the threshold, (H,)."""
    scores = []
    for head, tau in zip(diagonal, threshold, strict=True):
        lengths = []
        for position in range(head.shape[-1]):
            entries, runs = run_statistics(head[:, :, position] > tau)
            lengths.append(entries / runs if runs else 0.0)
        scores.append(sum(lengths) / len(lengths))
    return torch.tensor(scores, dtype=diagonal.dtype, device=diagonal.device)


def energy_ratio(inside: Tensor, outside: Tensor) -> Tensor:
    """inside / outside. With outside 0 it is inf, or 0 if inside is 0 too."""
    ratio = torch.where(outside <= 0, torch.where(inside > 0, math.inf, 0.0), inside / outside)
    return torch.where(inside.isnan(), math.nan, ratio)


def motion_scores(
    diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """DFC, TCS and DSR, each (H,), from the (H, F, F, P) diagonals, tau and the sum of squares.

    With one position (P = 1) nothing is off the diagonal, however ``square_sum`` is rounded. A NaN among a
    head's inputs makes all scores that depend on it NaN, also scores that only compare.
    """
    inside = diagonal.square().sum((1, 2, 3))
    outside = square_sum - inside if diagonal.shape[-1] > 1 else torch.zeros_like(inside)
    dsr = (diagonal >= mean_attention[:, None, None, None]).to(diagonal.dtype).mean((1, 2, 3))
    lost = diagonal.isnan().any(-1).flatten(1).any(1) | mean_attention.isnan()
    tcs = temporal_consistency(diagonal, mean_attention)
    tcs, dsr = (metric.masked_fill(lost, math.nan) for metric in (tcs, dsr))
    return energy_ratio(inside, outside), tcs, dsr


def motion_scores_of_map(block: Tensor, video: VideoTokens, width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """DFC, TCS and DSR straight from blocks (H, S, S), with diagonals ``width`` positions wide."""
    position = torch.arange(video.vision, device=block.device) % video.positions
    on_diagonal = (position[:, None] - position[None, :]).abs() <= width
    tau = block.mean((-1, -2))
    squares = block.square()
    inside = (squares * on_diagonal).sum((-1, -2))
    outside = (squares * ~on_diagonal).sum((-1, -2))
    above = (block >= tau[:, None, None]) & on_diagonal
    dsr = above.sum((-1, -2)).to(block.dtype) / on_diagonal.sum()
    return energy_ratio(inside, outside), temporal_consistency(diagonal(block, video), tau), dsr


def standardise(metric: Tensor) -> Tensor:
    """Zero mean and unit population deviation over the heads; a constant metric gives zeros.

    An infinite value counts as the largest finite value of the heads.
    """
    finite = metric[torch.isfinite(metric)]
    if bool((metric == math.inf).any()) and len(finite):
        metric = metric.clamp(max=finite.max())
    if bool((metric == metric[0]).all()):
        return torch.zeros_like(metric)
    return (metric - metric.mean()) / metric.std(correction=0)


def composite(dfc: Tensor, tcs: Tensor, dsr: Tensor) -> Tensor:
    """Sum of the three standardised metrics, (H,)."""
    return standardise(dfc) + standardise(tcs) + standardise(dsr)


def select(scores: Tensor, ratio: float = 0.5) -> Tensor:
    """Ascending indices of the highest max(1, floor(ratio * n + 1/2)) scores, ties to the lower index."""
    values = scores.tolist()
    count = max(1, math.floor(ratio * len(values) + 0.5))
    best = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    return torch.tensor(sorted(best), dtype=torch.int64, device=scores.device)


select_heads = select
select_tokens = select


def token_motion_scores(text_attention: Tensor, video: VideoTokens) -> Tensor:
    """MS: a token's mean attention per frame, averaged, plus its mean change between frames, (T,)."""
    frames = text_attention.unflatten(-1, (video.frames, video.positions)).mean(-1)
    if video.frames == 1:
        return frames[:, 0]
    return frames.mean(-1) + (frames[:, 1:] - frames[:, :-1]).abs().sum(-1) / (video.frames - 1)


def interpolation_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation with half-pixel centres as a (size_out, size_in) matrix, borders repeated."""
    matrix = torch.zeros(size_out, size_in, dtype=dtype, device=device)
    for out in range(size_out):
        place = max((out + 0.5) * size_in / size_out - 0.5, 0.0)
        low = min(math.floor(place), size_in - 1)
        high = min(low + 1, size_in - 1)
        matrix[out, low] += 1 - (place - low)
        matrix[out, high] += place - low
    return matrix


def resample_rows(maps: Tensor, grid_in: Grid, grid_out: Grid, *, normalize: bool = True) -> Tensor:
    """Trilinear resampling of rows (B, R, S_in) to (B, R, S_out), then each row scaled to sum to one."""
    volume = maps.unflatten(-1, grid_in)
    for axis, (size_in, size_out) in enumerate(zip(grid_in, grid_out, strict=True), start=2):
        matrix = interpolation_matrix(size_in, size_out, maps.dtype, maps.device)
        volume = (volume.transpose(axis, -1) @ matrix.T).transpose(axis, -1)
    result = volume.flatten(-3)
    return scaled_to_one(result) if normalize else result


def scaled_to_one(rows: Tensor) -> Tensor:
    """Rows (..., S) scaled to sum to one; rows that sum to zero become zero."""
    total = rows.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(rows), rows / total.masked_fill(total == 0, 1))


def row_l2_loss(student: Tensor, teacher: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """L2 norm of each row's difference: mean over a sample's valid rows, then over samples with a valid row.

    The gradient at a zero difference is zero.
    """
    if row_mask is None:
        row_mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    losses = []
    for one, other, valid in zip(student, teacher, row_mask, strict=True):
        if valid.any():
            losses.append(torch.stack([torch.linalg.vector_norm(d) for d in (one - other)[valid]]).mean())
    return torch.stack(losses).mean() if losses else (student[:0].sum() + teacher[:0].sum())


def align_rows(
    student: Tensor, teacher: Tensor, grid_in: Grid, grid_out: Grid, row_mask: Tensor | None = None
) -> Tensor:
    """Row L2 loss between student rows on the teacher's grid and teacher rows, all scaled to sum to one."""
    return row_l2_loss(resample_rows(student, grid_in, grid_out), scaled_to_one(teacher), row_mask)
