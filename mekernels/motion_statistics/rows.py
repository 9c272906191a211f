"""Which rows of the attention map MotionStatistics keeps in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..layout import VideoTokens


def text_rows(text_rows: Sequence[int] | Tensor | None, video: VideoTokens) -> Tensor:
    """(T,) int64 positions of text tokens in the sequence; all text tokens for None."""
    text = video.text_slice
    if text_rows is None:
        return torch.arange(text.start, text.stop)
    rows = torch.as_tensor(text_rows, device="cpu")
    if not rows.numel():
        return torch.zeros(0, dtype=torch.int64)
    if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(f"text_rows must be a sequence of integers, got {text_rows!r}")
    if int(rows.min()) < text.start or int(rows.max()) >= text.stop:
        raise ValueError(
            f"text_rows must be positions of text tokens, {text.start} to {text.stop - 1}, "
            f"got {rows.tolist()}"
        )
    return rows.to(torch.int64)


def sampled_count(sampled_rows: int | str, video: VideoTokens) -> int:
    """Number of video tokens to draw, at most all."""
    if isinstance(sampled_rows, str):
        checks.choice("sampled_rows", sampled_rows, ("all",))
        return video.vision
    if isinstance(sampled_rows, bool) or not isinstance(sampled_rows, int):
        raise TypeError(f"sampled_rows must be an int or 'all', got {type(sampled_rows).__name__}")
    if sampled_rows < 1:
        raise ValueError(f"sampled_rows must be at least 1, got {sampled_rows}")
    return min(sampled_rows, video.vision)


def stratified(total: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One index from each of ``count`` equal parts of range(total), and the lengths of the parts."""
    edges = torch.arange(count + 1) * total // max(1, count)
    sizes = edges.diff()
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, generator=generator, dtype=torch.float64)
    return edges[:-1] + (place * sizes).long().clamp(max=sizes - 1), sizes
