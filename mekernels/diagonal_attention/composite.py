"""``diagonal_attention`` in plain torch, one head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .call import Call


def forward(call: Call) -> Tensor:
    """The op: (B, H, F, F, P)."""
    query, dtype = call.query, checks.accumulate_dtype(call.query.dtype)
    out = query.new_empty((*query.shape[:2], call.frames, call.frames, call.positions), dtype=dtype)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            out[sample, head] = head_diagonal(call, *head_inputs(call, sample, head, dtype))
    return out


def head_inputs(call: Call, sample: int, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) queries, (fold, N, D) keys and (N,) logsumexp of one head."""
    key = call.key[sample, head].to(dtype).unflatten(0, (call.fold, -1))
    return call.query[sample, head].to(dtype), key, call.lse[sample, head].to(dtype)


def exp_(values: Tensor) -> Tensor:
    """Exponential in place, as a power of two: several times faster than ``exp_`` on the CPU."""
    return values.mul_(math.log2(math.e)).exp2_()


def head_diagonal(call: Call, query: Tensor, parts: Tensor, lse: Tensor) -> Tensor:
    """(F, F, P) of one head, P first in memory, from (N, D) queries, (fold, N, D) keys and (N,) logsumexp."""

    def by_position(tokens: Tensor) -> Tensor:
        video = tokens[call.start : call.start + call.vision]
        return video.reshape(call.frames, call.positions, -1).transpose(0, 1)

    own, shift = by_position(query), by_position(lse[:, None])
    weights = [exp_((own @ by_position(part).mT).mul_(call.softmax_scale).sub_(shift)) for part in parts]
    total = weights[0]
    for more in weights[1:]:
        total += more
    return total.permute(1, 2, 0)
