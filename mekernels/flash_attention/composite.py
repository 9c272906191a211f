"""``flash_attention`` in plain torch, a few rows of one head at a time: any dtype, width and length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .call import Call, Result

CHUNK_ELEMENTS = 1 << 20
"""Maximum number of scores held at a time."""


def forward(call: Call) -> Result:
    """The op, differentiable."""
    return flash_attention_op(*call)


def _blocks(
    query: Tensor, key: Tensor, scale: float, causal: bool, left: int, right: int, softcap: float
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Scores of a few rows of one head at a time, as (sample, head, rows, (rows, Nk) scores)."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    step = max(1, CHUNK_ELEMENTS // max(1, keys))
    position = torch.arange(keys, device=query.device)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys_t = key[sample, head // groups].to(dtype).T
            for start in range(0, queries, step):
                rows = slice(start, min(start + step, queries))
                scores = (query[sample, head, rows].to(dtype) * scale) @ keys_t
                if softcap:
                    scores.div_(softcap).tanh_().mul_(softcap)
                own = torch.arange(rows.start, rows.stop, device=query.device)[:, None] + keys - queries
                if causal or right >= 0:
                    scores.masked_fill_(position > own + (0 if causal else right), -math.inf)
                if left >= 0:
                    scores.masked_fill_(position < own - left, -math.inf)
                yield sample, head, rows, scores


@torch.library.custom_op("mekernels::flash_attention", mutates_args=())
def flash_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    causal: bool,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The chunked composite: any dtype, width and length, memory O(Nk) beyond its results."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -math.inf, dtype=dtype)
    if not key.shape[2]:
        return out, lse
    for sample, head, rows, scores in _blocks(query, key, softmax_scale, causal, left, right, softcap):
        total = scores.logsumexp(-1)
        weights = scores.sub_(total.masked_fill(total == -math.inf, 0)[:, None]).exp_()
        out[sample, head, rows] = (weights @ value[sample, head // groups].to(dtype)).to(out.dtype)
        lse[sample, head, rows] = total
    return out, lse


@flash_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool, *_: Any) -> Result:
    lse = query.new_empty(query.shape[:3], dtype=checks.accumulate_dtype(query.dtype))
    return query.new_empty(*query.shape[:3], value.shape[3]), lse


@torch.library.custom_op("mekernels::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, recomputing the weights chunk by chunk."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.zeros_like(item, dtype=dtype, memory_format=torch.contiguous_format)
        for item in (query, key, value)
    )
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    for sample, head, rows, scores in _blocks(query, key, softmax_scale, causal, left, right, softcap):
        group = head // groups
        total = lse[sample, head, rows]
        if softcap:
            slope_of_cap = 1 - (scores.masked_fill(scores == -math.inf, 0) / softcap).square_()
        weights = scores.sub_(total.masked_fill(total == -math.inf, 0)[:, None]).exp_()
        given = grad[sample, head, rows].to(dtype)
        grad_value[sample, group] += weights.T @ given
        slope = given @ value[sample, group].to(dtype).T
        slope.sub_(delta[sample, head, rows, None]).mul_(weights).mul_(softmax_scale)
        if softcap:
            slope.mul_(slope_of_cap)
        grad_query[sample, head, rows] = slope @ key[sample, group].to(dtype)
        grad_key[sample, group] += slope.T @ query[sample, head, rows].to(dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


@flash_attention_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output) -> None:
    query, key, value, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, grad, _):
    grads = flash_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * len(ctx.options)


flash_attention_op.register_autograd(_backward, setup_context=_setup)
