"""Rows, columns, sums and statistics of a causal attention without gradients, beside what else gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mekernels import attention_columns, attention_rows, attention_sums, flash_attention, head_statistics

from . import device
from .checks import assert_error_rule
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import STUDENTS, Student, dtype, randn
from .student_entries import MOST_TOKENS, chosen_columns, one_hot_values, whole_map
from .student_rows import chosen_rows
from .work import Work

OPS = {
    "attention_rows": "attention_rows",
    "attention_columns": "attention_columns",
    "attention_sums": "attention_sums",
    "head_statistics": "attention_row_statistics",
}
"""Functions, and the op that each runs."""


def _parts(op: str, part: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """What one part of a map's columns, (B, Hq, N, c), adds to the result; ``columns`` are its positions."""
    if op == "attention_rows":
        return part[:, :, rows]
    if op == "attention_columns":
        return part
    if op == "attention_sums":
        return part.sum(2)
    part = part.float() if part.dtype != torch.float64 else part
    place = torch.arange(part.shape[2], device=part.device)
    first = (part * (columns == 0)).sum(-1)
    apart = (part * (place[:, None] - columns).abs()).sum(-1)
    return torch.stack([item.mean(-1) for item in (-torch.xlogy(part, part).sum(-1), apart, first)], -1)


def _work(shape: Student, op: str) -> Work:
    kind, chosen, rows = dtype(), chosen_columns(shape)[0], chosen_rows(shape)
    place = torch.arange(shape.tokens, device=device.device())

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (1, shape.heads, shape.tokens, shape.width)
        query = randn(*size, seed=3 * seed, kind=kind)
        key = randn(1, shape.key_heads, *size[2:], seed=3 * seed + 1, kind=kind)
        return query, key, flash_attention(query, key, key, causal=True)[1]

    def ours(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        if op == "head_statistics":
            return torch.stack(head_statistics(query, key, lse, causal=True)[:3], -1)
        if op == "attention_rows":
            return attention_rows(query, key, rows, slice(None), causal=True, reduce="none")
        if op == "attention_sums":
            return attention_sums(query, key, lse, over="rows", causal=True)
        return attention_columns(query, key, lse, chosen[None], causal=True, reduce="none")

    def of_map(attention: Tensor) -> Tensor:
        if op == "attention_columns":
            return attention[..., chosen]
        return _parts(op, attention, place, rows[0])

    def eager(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        return of_map(whole_map(query, key)).float()

    def identity_values(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        """The method of AttnRead: attention to parts of the identity, a head's width of columns at a time."""
        wanted = [chosen] if op == "attention_columns" else place.split(shape.width)
        found = []
        for part in wanted:
            value = one_hot_values(shape, part, kind)
            read = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            found.append(_parts(op, read.float(), part, rows[0]))
        return torch.stack(found).sum(0) if op == "head_statistics" else torch.cat(found, -1)

    def flex(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        value = one_hot_values(shape, chosen, kind)
        return _flex()(query, key, value, block_mask=_causal(shape.tokens), enable_gqa=True).float()

    @cache
    def wanted(kind: torch.dtype) -> Tensor:
        query, key, _ = make(0)
        pairs = ((head, head * shape.key_heads // shape.heads) for head in range(shape.heads))
        maps = (whole_map(query[:, h, None].to(kind), key[:, g, None].to(kind)) for h, g in pairs)
        return torch.cat([of_map(one) for one in maps], 1)

    def check(role: str, result: Tensor, inputs: tuple[Any, ...]) -> None:
        assert_error_rule(result, wanted(torch.float64), wanted(kind), rounding=kind)

    named = roles(OPS[op], PROBES[op], ours) | {"identity values": identity_values, "eager map": eager}
    if op == "attention_columns":
        named["flex_attention"] = flex
    return Work(f"{op}, forward", shape.case, make, named, check, kind, shape.tokens, op=OPS[op])


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal(tokens: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    return create_block_mask(seen, None, None, tokens, tokens, device=device.device())


def _probe(read: Callable[..., Any]) -> Callable[[], None]:
    def run() -> None:
        query = randn(1, 1, 32, 64, seed=0, kind=dtype())
        read(query, query, randn(1, 1, 32, seed=1))

    return run


PROBES = {
    "attention_rows": _probe(
        lambda q, k, lse: attention_rows(q, k, torch.zeros_like(lse[0, :, :1]).long(), slice(8))
    ),
    "attention_columns": _probe(lambda *given: attention_columns(*given, slice(0, 8))),
    "attention_sums": _probe(lambda *given: attention_sums(*given, over="rows")),
    "head_statistics": _probe(head_statistics),
}
"""The smallest call, to learn which backends can run."""


def plans(size: str) -> list[Plan]:
    shapes = [shape for shape in STUDENTS[size] if shape.tokens <= MOST_TOKENS]
    found = []
    for op in OPS:
        named = ("ours", *map(label, others(OPS[op], PROBES[op])), "identity values", "eager map")
        # It must be compiled first, which takes longer than all the smallest works.
        named += ("flex_attention",) if op == "attention_columns" and size != "tiny" else ()
        found += [Plan(shape.case, named, lambda shape=shape, op=op: _work(shape, op)) for shape in shapes]
    return found
