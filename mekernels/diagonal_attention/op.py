"""Attention between the same position of all pairs of frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from ..layout import VideoTokens


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
        softmax_scale: factor on the scores, 1 / sqrt(D) by default; the one ``lse`` was made with.
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
    backend = backends.active()
    if backend == "reference":
        result = backends.by_reference(
            reference.diagonal_attention, query, key, lse, video, softmax_scale=scale, fold=fold
        )
        return result.to(checks.accumulate_dtype(query.dtype))
    start = video.vision_slice.start
    return diagonal_attention_op(query, key, lse, video.frames, video.positions, start, scale, fold, backend)


def check_side_inputs(
    query: Tensor, key: Tensor, lse: Tensor, video: VideoTokens, softmax_scale: float | None, fold: int
) -> float:
    """Check query, key and logsumexp of one attention against a layout; returns the softmax scale."""
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


@torch.library.custom_op("mekernels::diagonal_attention", mutates_args=())
def diagonal_attention_op(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    frames: int,
    positions: int,
    start: int,
    softmax_scale: float,
    fold: int,
    backend: str,
) -> Tensor:
    """(B, H, F, F, P); ``start`` is the first video token."""
    return backends.dispatch(
        "diagonal_attention", backend, query, key, lse, frames, positions, start, softmax_scale, fold
    )


@diagonal_attention_op.register_fake
def _(query, key, lse, frames, positions, start, softmax_scale, fold, backend):
    size = (*query.shape[:2], frames, frames, positions)
    return query.new_empty(size, dtype=checks.accumulate_dtype(query.dtype))


def exp_(values: Tensor) -> Tensor:
    """Exponential in place, by the power of two, which is several times faster than ``exp_`` on the CPU."""
    return values.mul_(math.log2(math.e)).exp2_()


def head_diagonal(
    query: Tensor, parts: Tensor, lse: Tensor, scale: float, frames: int, positions: int, start: int
) -> Tensor:
    """(F, F, P) of one head, P first in memory, from (N, D) queries, (fold, N, D) keys and (N,) logsumexp."""

    def by_position(tokens: Tensor) -> Tensor:
        return tokens[start : start + frames * positions].reshape(frames, positions, -1).transpose(0, 1)

    own, shift = by_position(query), by_position(lse[:, None])
    weights = [exp_((own @ by_position(part).mT).mul_(scale).sub_(shift)) for part in parts]
    total = weights[0]
    for more in weights[1:]:
        total += more
    return total.permute(1, 2, 0)


def _composite(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    frames: int,
    positions: int,
    start: int,
    softmax_scale: float,
    fold: int,
) -> Tensor:
    dtype = checks.accumulate_dtype(query.dtype)
    out = query.new_empty((*query.shape[:2], frames, frames, positions), dtype=dtype)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            queries, shift = query[sample, head].to(dtype), lse[sample, head].to(dtype)
            parts = key[sample, head].to(dtype).unflatten(0, (fold, -1))
            out[sample, head] = head_diagonal(queries, parts, shift, softmax_scale, frames, positions, start)
    return out


def _triton_reasons(query: Tensor, *_) -> list[str]:
    return launch.reasons(query)


def _triton(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    frames: int,
    positions: int,
    start: int,
    softmax_scale: float,
    fold: int,
) -> Tensor:
    from . import triton as kernel

    out = query.new_empty((*query.shape[:2], frames, frames, positions), dtype=torch.float32)
    launch.run(kernel.plan(out, query, key, lse, frames, positions, start, softmax_scale, fold))
    return out


backends.register("diagonal_attention", "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register("diagonal_attention", "torch", _composite)
