"""``MotionStatistics.update`` in plain torch, one head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..diagonal_attention.call import Call
from ..diagonal_attention.composite import exp_, head_diagonal, head_inputs
from .sums import Sums

CHUNK_ELEMENTS = 1 << 18
"""Attention entries held at a time: few enough for the cache of a core."""


def update(sums: Sums, call: Call) -> None:
    """The op: add the map of one sample."""
    dtype = sums.diagonal.dtype
    vision = slice(call.start, call.start + call.vision)
    written = slice(call.text_start, call.text_start + call.text)
    for head in range(call.query.shape[1]):
        queries, parts, shift = head_inputs(call, 0, head, dtype)
        shift = finite_or_nan(shift)
        sums.diagonal[head] += head_diagonal(call, queries, parts, shift)
        chosen = queries[sums.tokens].mul_(call.softmax_scale)
        for part in parts:
            _add_rows(sums.rows[head, :, : call.vision], chosen, part[vision].T, shift[sums.tokens, None])
        words = (parts[:, written] * call.softmax_scale).flatten(0, 1).T
        _add_vision_mass(sums.vision_mass[head], queries[vision], words, shift[vision, None])


def finite_or_nan(lse: Tensor) -> Tensor:
    """NaN in place of an infinite logsumexp: such a row has no softmax."""
    return lse.masked_fill(lse.isinf(), math.nan)


def _add_rows(total: Tensor, query: Tensor, key: Tensor, lse: Tensor) -> None:
    step = max(1, CHUNK_ELEMENTS // key.shape[1])
    held = query.new_empty(min(step, len(query)), key.shape[1])
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        weights = torch.mm(query[some], key, out=held[: len(query[some])])
        total[some] += exp_(weights.sub_(lse[some]))


def _add_vision_mass(total: Tensor, query: Tensor, words: Tensor, lse: Tensor) -> None:
    """Add one minus the mass on the text keys, of which there are far fewer than video keys."""
    if not words.shape[1]:
        total += 1 + (lse - lse)[:, 0]
        return
    step = max(1, CHUNK_ELEMENTS // words.shape[1])
    held = query.new_empty(min(step, len(query)), words.shape[1])
    for first in range(0, len(query), step):
        some = slice(first, first + step)
        weights = torch.mm(query[some], words, out=held[: len(query[some])])
        on_text = exp_(weights.sub_(lse[some])).sum(-1)
        total[some] += on_text.neg_().add_(1).clamp_(min=0)
