"""The op behind ``MotionStatistics.update``: add one attention map to the running sums.

Example:
    >>> import torch, mekernels
    >>> video = mekernels.VideoTokens(frames=2, height=1, width=2, text=1)
    >>> statistics = mekernels.MotionStatistics(video, heads=1, sampled_rows=2)
    >>> statistics.update(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8), torch.full((1, 1, 5), 5.0).log())
    >>> statistics.state_dict()["vision_mass"]
    tensor([[0.8000, 0.8000, 0.8000, 0.8000]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, launch
from ..diagonal_attention.op import exp_, head_diagonal

CHUNK_ELEMENTS = 1 << 18
"""Attention entries the composite holds at a time: few enough to stay in a core's cache."""


@torch.library.custom_op(
    "mekernels::motion_statistics_update", mutates_args=("diagonal", "rows", "vision_mass")
)
def motion_statistics_op(
    diagonal: Tensor,
    rows: Tensor,
    vision_mass: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    frames: int,
    positions: int,
    vision_start: int,
    text: int,
    text_start: int,
    softmax_scale: float,
    fold: int,
    backend: str,
) -> None:
    """Add one map to diagonal (H, F, F, P), rows (H, len(index), S) and vision_mass (H, S), any strides.

    ``index`` holds positions in the token sequence; ``text`` keys from ``text_start`` on are no video tokens.
    """
    backends.dispatch(
        "motion_statistics_update",
        backend,
        diagonal,
        rows,
        vision_mass,
        query,
        key,
        lse,
        index,
        frames,
        positions,
        vision_start,
        text,
        text_start,
        softmax_scale,
        fold,
    )


@motion_statistics_op.register_fake
def _(*args) -> None:
    return None


def _composite(
    diagonal: Tensor,
    rows: Tensor,
    vision_mass: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    frames: int,
    positions: int,
    vision_start: int,
    text: int,
    text_start: int,
    softmax_scale: float,
    fold: int,
) -> None:
    dtype = diagonal.dtype
    vision = slice(vision_start, vision_start + frames * positions)
    written = slice(text_start, text_start + text)
    for head in range(query.shape[1]):
        queries, shift = query[0, head].to(dtype), lse[0, head].to(dtype)
        parts = key[0, head].to(dtype).unflatten(0, (fold, -1))
        layout = (frames, positions, vision_start)
        diagonal[head] += head_diagonal(queries, parts, shift, softmax_scale, *layout)
        chosen = queries[index].mul_(softmax_scale)
        for part in parts:
            _add_rows(rows[head], chosen, part[vision].T, shift[index, None])
        words = (parts[:, written] * softmax_scale).flatten(0, 1).T
        _add_vision_mass(vision_mass[head], queries[vision], words, shift[vision, None])


def _add_rows(total: Tensor, query: Tensor, key: Tensor, lse: Tensor) -> None:
    step = max(1, CHUNK_ELEMENTS // key.shape[1])
    held = query.new_empty(min(step, len(query)), key.shape[1])
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        weights = torch.mm(query[some], key, out=held[: len(query[some])])
        total[some] += exp_(weights.sub_(lse[some]))


def _add_vision_mass(total: Tensor, query: Tensor, words: Tensor, lse: Tensor) -> None:
    """One minus the mass on the text keys, which are far fewer than the video's."""
    if not words.shape[1]:
        total += 1
        return
    step = max(1, CHUNK_ELEMENTS // words.shape[1])
    held = query.new_empty(min(step, len(query)), words.shape[1])
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        weights = torch.mm(query[some], words, out=held[: len(query[some])])
        on_text = exp_(weights.sub_(lse[some])).sum(-1)
        total[some] += on_text.neg_().add_(1).clamp_(min=0)


def _triton_reasons(diagonal: Tensor, rows: Tensor, vision_mass: Tensor, query: Tensor, *_) -> list[str]:
    return launch.reasons(query)


def _triton(diagonal: Tensor, rows: Tensor, vision_mass: Tensor, *inputs) -> None:
    from . import triton as kernel

    launch.run(kernel.plan(diagonal, rows, vision_mass, *inputs))


backends.register(
    "motion_statistics_update", "triton", _triton, reasons=_triton_reasons, machine=launch.machine
)
backends.register("motion_statistics_update", "torch", _composite)
