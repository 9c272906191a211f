"""Columns and sums of a student's causal attention, with their gradients, beside maps and one-hot values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mekernels import attention_columns, attention_sums, flash_attention
from mekernels.attention_entries import differentiable_lse

from . import device
from .checks import assert_error_rule
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import STUDENTS, Student, dtype, randn
from .work import Work

Result = tuple[Tensor, ...]
COLUMNS = 32
MOST_TOKENS = 8192
"""More would take too long to check in float64."""


def chosen_columns(shape: Student) -> Tensor:
    """(1, C) positions of keys within the video."""
    step = max(1, (shape.columns.stop - shape.columns.start) // COLUMNS)
    return torch.arange(shape.columns.start, shape.columns.stop, step, device=device.device())[None, :COLUMNS]


def whole_map(query: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, N, N), plainly; rounded as eager attention of a model rounds it."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ keys.mT * query.shape[3] ** -0.5).masked_fill(later, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)


def one_hot_values(shape: Student, columns: Tensor, kind: torch.dtype) -> Tensor:
    """(1, Hk, N, C) values that are 1 at one key each: attention to them is those columns of the map."""
    place = torch.arange(shape.tokens, device=columns.device)
    return (place[:, None] == columns).to(kind).expand(1, shape.key_heads, -1, -1)


def _graded(read: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Result]:
    def run(query: Tensor, key: Tensor, lse: Tensor, above: Tensor) -> Result:
        found = read(query, key, lse)
        return found.detach(), *torch.autograd.grad(found, (query, key), above.to(found.dtype))

    return run


def _by_head(read: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, above: Tensor) -> Result:
    """Of each query head by itself, so that one map is held: (B, Hq, ..), and gradients of query and key."""
    groups = query.shape[1] // key.shape[1]
    values, grad_query, grad_key = [], torch.empty_like(query), torch.zeros_like(key)
    for head in range(query.shape[1]):
        part = slice(head // groups, head // groups + 1)
        pair = [item.detach().requires_grad_() for item in (query[:, head, None], key[:, part])]
        found = read(whole_map(*pair))
        grads = torch.autograd.grad(found, pair, above[:, head, None])
        values.append(found.detach())
        grad_query[:, head, None] = grads[0]
        grad_key[:, part] += grads[1]
    return torch.cat(values, 1), grad_query, grad_key


def _work(shape: Student, op: str) -> Work:
    kind, columns = dtype(), chosen_columns(shape)
    sums, count = op == "attention_sums", columns.shape[1]
    scale = shape.width**-0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        size = (1, shape.heads, shape.tokens, shape.width)
        query = randn(*size, seed=3 * seed, kind=kind)
        key = randn(1, shape.key_heads, *size[2:], seed=3 * seed + 1, kind=kind)
        _, lse = flash_attention(query, key, key, causal=True)
        above = randn(*size[:3], *(() if sums else (count,)), seed=3 * seed + 2)
        return query.requires_grad_(), key.requires_grad_(), lse, above

    def ours(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        lse = differentiable_lse(query, key, lse, (scale, -1, 0, 0.0))
        if sums:
            return attention_sums(query, key, lse, over="rows", causal=True)
        return attention_columns(query, key, lse, columns, causal=True, reduce="none")

    def of_map(attention: Tensor) -> Tensor:
        return attention.sum(2) if sums else attention[..., columns[0]]

    def eager(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        return of_map(whole_map(query, key)).float()

    def one_hot(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        value = one_hot_values(shape, columns, kind)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).float()

    @cache
    def wanted(kind: torch.dtype) -> Result:
        query, key, _, above = (item.detach() for item in make(0))
        return _by_head(of_map, query.to(kind), key.to(kind), above.to(kind))

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        pairs = zip(result, wanted(torch.float64), wanted(kind), (2.0, 3.0, 3.0), strict=True)
        for found, exact, plain, factor in pairs:
            assert_error_rule(found, exact, plain, factor=factor, rounding=kind)

    named = {name: _graded(call) for name, call in roles(op, PROBES[op], ours).items()}
    if not sums:
        named["one-hot values"] = _graded(one_hot)
    return Work(
        f"{op}, forward and backward",
        shape.case,
        make,
        named | {"eager map": _graded(eager)},
        check,
        kind,
        shape.tokens,
        op=op,
    )


def _probe(read: Callable[..., Tensor]) -> Callable[[], None]:
    def run() -> None:
        query = randn(1, 1, 32, 64, seed=0, kind=dtype()).requires_grad_()
        read(query, query, randn(1, 1, 32, seed=1)).sum().backward()

    return run


PROBES = {
    "attention_columns": _probe(lambda *given: attention_columns(*given, slice(0, 8))),
    "attention_sums": _probe(lambda *given: attention_sums(*given, over="rows")),
}
"""The smallest call with a gradient, to learn which backends can run."""


def _plans(op: str, size: str) -> list[Plan]:
    beside = ("eager map",) if op == "attention_sums" else ("one-hot values", "eager map")
    named = ("ours", *map(label, others(op, PROBES[op])), *beside)
    shapes = [shape for shape in STUDENTS[size] if shape.tokens <= MOST_TOKENS]
    return [Plan(shape.case, named, lambda shape=shape: _work(shape, op)) for shape in shapes]


def column_plans(size: str) -> list[Plan]:
    return _plans("attention_columns", size)


def sum_plans(size: str) -> list[Plan]:
    return _plans("attention_sums", size)
