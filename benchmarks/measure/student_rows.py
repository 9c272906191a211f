"""Chosen rows of a student's causal attention and their gradients, next to the attention they are read of."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mekernels import attention_rows

from . import device
from .checks import assert_error_rule, causal_rows
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import STUDENTS, Student, dtype, randn
from .work import Work

Result = tuple[Tensor, ...]


def chosen_rows(shape: Student) -> Tensor:
    """(1, R) positions of words behind the video."""
    first = shape.columns.stop
    step = max(1, (shape.tokens - first) // shape.rows)
    return torch.arange(first, shape.tokens, step, device=device.device())[None, : shape.rows]


def work(shape: Student) -> Work:
    kind, rows, columns = dtype(), chosen_rows(shape), shape.columns

    def make(seed: int) -> tuple[Tensor, ...]:
        size = (1, shape.heads, shape.tokens, shape.width)
        shared = (1, shape.key_heads, *size[2:])
        query, key, value = (
            randn(*part, seed=5 * seed + i, kind=kind) for i, part in enumerate((size, shared, shared))
        )
        width = columns.stop - columns.start
        above = randn(1, rows.shape[1], width, seed=5 * seed + 3)
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), above

    def graded(read: Any) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, above: Tensor) -> Result:
            picked = read(query, key)
            return picked.detach(), *torch.autograd.grad(picked, (query, key), above)

        return run

    def ours(query: Tensor, key: Tensor) -> Tensor:
        return attention_rows(query, key, rows, columns, causal=True)

    def eager(query: Tensor, key: Tensor) -> Tensor:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ keys.mT * query.shape[3] ** -0.5
        later = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool, device=query.device).triu(1)
        attention = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32)
        return attention.to(query.dtype).mean(1)[:, rows[0], columns].float()

    def flash(query: Tensor, key: Tensor, value: Tensor, above: Tensor) -> Result:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.detach(), *torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    @cache
    def wanted(kind: torch.dtype) -> Result:
        query, key, _, above = make(0)
        picked = causal_rows(query, key, rows, columns, kind)
        return picked.detach(), *torch.autograd.grad(picked, (query, key), above.to(picked.dtype))

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        if role == "flash alone":
            _check_flash(result[0], inputs)
            return
        for found, exact, plain, factor in zip(
            result, wanted(torch.float64), wanted(kind), (2.0, 3.0, 3.0), strict=True
        ):
            assert_error_rule(found, exact, plain, factor=factor)

    return Work(
        "attention_rows, forward and backward",
        shape.case,
        make,
        {
            **{name: graded(call) for name, call in roles("attention_rows", _probe, ours).items()},
            "flash alone": flash,
            "eager map": graded(eager),
        },
        check,
        kind,
        shape.tokens,
        **least(shape, rows.shape[1], kind.itemsize),
        beside=("flash alone",),
        op="attention_rows",
    )


def least(shape: Student, rows: int, itemsize: int) -> dict[str, float]:
    """What the rows and their gradients take at least, as fields of :class:`Work`."""
    vectors = shape.heads * rows + shape.key_heads * shape.tokens
    # Forward and backward read the rows and all keys; the gradients of all keys and queries are written.
    halves = 2 * vectors + (shape.key_heads + shape.heads) * shape.tokens
    entries = rows * (shape.columns.stop - shape.columns.start)
    scores = float(shape.heads * rows * shape.tokens)
    return {
        # The entries are written, and their gradients read, in float32.
        "moved": float(halves * shape.width * itemsize + 2 * entries * 4),
        # Scores once forward and once backward, and the two products of the gradients.
        "operations": 4 * 2 * scores * shape.width,
        "exponentials": 2 * scores,
    }


def _check_flash(out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """The last tokens of the first head, of which one row is one line of mathematics."""
    query, key, value = (tensor[:, :1].detach() for tensor in inputs[:3])
    for kind in (torch.float64, out.dtype):
        scores = query[0, 0, -1].to(kind) @ key[0, 0].to(kind).T * query.shape[3] ** -0.5
        row = scores.softmax(-1) @ value[0, 0].to(kind)
        if kind == torch.float64:
            exact = row
    assert_error_rule(out[0, 0, -1], exact, row)


def _read_some() -> Tensor:
    query = randn(1, 1, 32, 64, seed=0, kind=dtype()).requires_grad_()
    return attention_rows(
        query, query, torch.zeros(1, 1, dtype=torch.int64, device=query.device), slice(0, 8)
    )


def _probe() -> None:
    """Rows of the smallest attention with a gradient, to learn which backends can run."""
    _read_some().sum().backward()


@cache
def _backends() -> list[str]:
    return others("attention_rows", _probe)


def plans(size: str) -> list[Plan]:
    named = ("ours", *map(label, _backends()), "flash alone", "eager map")
    return [Plan(shape.case, named, lambda shape=shape: work(shape)) for shape in STUDENTS[size]]
