"""How much each text token's attention moves over the frames."""

from __future__ import annotations

from torch import Tensor

from . import backends, checks, native, reference
from .layout import VideoTokens


def token_motion_scores(text_attention: Tensor, video: VideoTokens) -> Tensor:
    """Motion score of text tokens: mean attention over the frames, plus mean absolute change between frames.

    Args:
        text_attention: (T, S) floating point, attention of text rows to S = ``video.vision`` video tokens.
        video: the grid of the video tokens.

    Returns:
        (T,), float64 for float64 input and float32 otherwise. With one frame there is no change to add. Not
        differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: motion-salient token identification in the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> video = mekernels.VideoTokens(frames=2, height=1, width=2)
        >>> mekernels.token_motion_scores(torch.tensor([[0.0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]), video)
        tensor([1.5000, 0.5000])
    """
    checks.tensor("text_attention", text_attention, 2, layout="(text tokens, video tokens)")
    checks.video_tokens("video", video)
    checks.shape(
        "text_attention", text_attention, (len(text_attention), video.vision), meaning="(any, video.vision)"
    )
    if backends.active() == "reference":
        scores = backends.by_reference(reference.token_motion_scores, text_attention, video)
        return scores.to(checks.accumulate_dtype(scores.dtype))
    return token_motion_scores_op(text_attention, video.frames)


def _fake(text_attention: Tensor, frames: int) -> Tensor:
    dtype = checks.accumulate_dtype(text_attention.dtype)
    return text_attention.new_empty(text_attention.shape[:1], dtype=dtype)


token_motion_scores_op = backends.Op("token_motion_scores", _fake)
"""(T,) from (T, F * P)."""


def _composite(text_attention: Tensor, frames: int) -> Tensor:
    dtype = checks.accumulate_dtype(text_attention.dtype)
    level = text_attention.unflatten(-1, (frames, -1)).mean(-1, dtype=dtype)
    return level.mean(-1) + level.diff(dim=-1).abs().sum(-1) / max(1, frames - 1)


def _native_reasons(text_attention: Tensor, frames: int) -> list[str]:
    return native.narrow_float_reasons(text_attention=text_attention)


def _native(text_attention: Tensor, frames: int) -> Tensor:
    return native.token_motion_scores(text_attention, frames)


backends.register("token_motion_scores", "native", _native, reasons=_native_reasons, machine=native.machine)
backends.register("token_motion_scores", "torch", _composite)
