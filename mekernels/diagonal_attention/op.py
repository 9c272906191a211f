"""Attention between the same position of all pairs of frames."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks, launch, reference
from ..layout import VideoTokens
from . import composite
from .call import Call


def diagonal_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    video: VideoTokens,
    *,
    softmax_scale: float | None = None,
    fold: int = 1,
) -> Tensor:
    """Attention of every video token to its own position in every frame, exact, from the logsumexp.

    Args:
        query: (B, H, N, D) with N = ``video.length``, floating point, any strides.
        key: (B, H, fold * N, D).
        lse: (B, H, N) natural-log logsumexp over all keys, as :func:`mekernels.flash_attention` returns it.
        video: where the video's tokens lie.
        softmax_scale: factor on the scores, 1 / sqrt(D) by default; the same factor that gave ``lse``.
        fold: number of equal parts of the key axis whose masses are added; 2 where reference keys follow the
            own keys.

    Returns:
        (B, H, F, F, P), float64 for float64 input and float32 otherwise: entry [f, g, p] is the attention of
        token (f, p) to token (g, p). Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the diagonal set of motion-sensitive head selection in the paper "MotionEnhancer" (CVPR 2026,
    arXiv 2606.06853), band width 0.

    Example:
        >>> import torch, mekernels
        >>> video = mekernels.VideoTokens(frames=3, height=2, width=2, text=5)
        >>> query, key, value = torch.randn(3, 1, 2, video.length, 16)
        >>> _, lse = mekernels.flash_attention(query, key, value)
        >>> mekernels.diagonal_attention(query, key, lse, video).shape
        torch.Size([1, 2, 3, 3, 4])
    """
    scale = check_side_inputs(query, key, lse, video, softmax_scale, fold)
    if backends.active() == "reference":
        result = backends.by_reference(
            reference.diagonal_attention, query, key, lse, video, softmax_scale=scale, fold=fold
        )
        return result.to(checks.accumulate_dtype(query.dtype))
    return diagonal_attention_op(Call.of(query, key, lse, video, scale, fold))


def check_side_inputs(
    query: Tensor, key: Tensor, lse: Tensor, video: VideoTokens, softmax_scale: float | None, fold: int
) -> float:
    """Check query, key and logsumexp of one attention against a layout; return the softmax scale."""
    checks.video_tokens("video", video)
    checks.query_key(query, key)
    own = checks.fold(fold, key.shape[2])
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key must have as many heads as query ({query.shape[1]}), got {key.shape[1]}")
    if query.shape[2] != video.length:
        raise ValueError(f"query must have video.length = {video.length} tokens, got {query.shape[2]}")
    if own != video.length:
        raise ValueError(
            f"key must have fold * video.length = {fold * video.length} tokens, got {key.shape[2]}"
        )
    checks.tensor("lse", lse, 3, layout="(batch, heads, tokens)")
    checks.shape("lse", lse, query.shape[:3], meaning="(batch, heads, tokens)")
    checks.same_device("lse", lse, "query", query)
    return checks.scale(softmax_scale, query.shape[3])


def _fake(call: Call) -> Tensor:
    size = (*call.query.shape[:2], call.frames, call.frames, call.positions)
    return call.query.new_empty(size, dtype=checks.accumulate_dtype(call.query.dtype))


diagonal_attention_op = backends.Op("diagonal_attention", _fake)
"""(B, H, F, F, P)."""


def _triton(call: Call) -> Tensor:
    from . import plan

    return plan.forward(call)


def _triton_reasons(call: Call) -> list[str]:
    return launch.reasons(call.query)


backends.register("diagonal_attention", "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register("diagonal_attention", "torch", composite.forward)
