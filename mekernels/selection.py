"""Selection of the best heads and tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .motion_scores import MotionScores


def select_heads(scores: MotionScores | Tensor, ratio: float = 0.5) -> Tensor:
    """The heads with the highest composite score.

    Args:
        scores: MotionScores of H heads, or any (H,) scores, such as ``MotionScores.composite()``.
        ratio: share of the heads to keep, 0 to 1: max(1, floor(ratio * H + 1/2)) are kept.

    Returns:
        Ascending int64 head indices on the device of ``scores``; equal scores go to the lower index.

    Raises:
        TypeError, ValueError: an argument does not fit, ``scores`` is empty or has NaN.

    Source: motion-sensitive head selection in the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> mekernels.select_heads(torch.tensor([0.1, 0.9, 0.9, 0.2]))
        tensor([1, 2])
    """
    return _select(scores.composite() if isinstance(scores, MotionScores) else scores, ratio)


def select_tokens(scores: Tensor, ratio: float = 0.5) -> Tensor:
    """The text tokens with the highest motion score.

    Args:
        scores: (T,) floating point, as :func:`mekernels.token_motion_scores` returns them.
        ratio: share of the tokens to keep, 0 to 1: max(1, floor(ratio * T + 1/2)) are kept.

    Returns:
        Ascending int64 token indices on the device of ``scores``; equal scores go to the lower index.

    Raises:
        TypeError, ValueError: an argument does not fit, ``scores`` is empty or has NaN.

    Source: motion-salient token identification in the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> mekernels.select_tokens(torch.tensor([0.3, 0.1, 0.2]), ratio=0.5)
        tensor([0, 2])
    """
    return _select(scores, ratio)


def _select(scores: Tensor, ratio: float) -> Tensor:
    checks.tensor("scores", scores, 1)
    share = checks.ratio("ratio", ratio)
    if not len(scores):
        raise ValueError("scores must have at least one entry, got none")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores must not contain NaN, got {int(scores.isnan().sum())} of {len(scores)}")
    count = max(1, math.floor(share * len(scores) + 0.5))
    best = torch.sort(scores.detach(), descending=True, stable=True).indices[:count]
    return best.sort().values
