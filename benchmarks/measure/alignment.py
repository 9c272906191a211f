"""From captured attention to the loss: rows brought to the teacher's grid and compared, with gradients."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mekernels import align_rows, reference, resample_rows, row_l2_loss

from .checks import assert_error_rule
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import ROWS, Rows, randn
from .work import Work

Result = tuple[Tensor, Tensor]
TWO_OPS = "resample_rows, row_l2_loss"


def _work(shape: Rows) -> Work:
    def make(seed: int) -> tuple[Tensor, ...]:
        maps, teacher = (
            randn(shape.batch, shape.rows, math.prod(grid), seed=2 * seed + i).softmax(-1)
            for i, grid in enumerate((shape.student, shape.teacher))
        )
        return maps.requires_grad_(), teacher

    def graded(loss: Any) -> Any:
        def run(maps: Tensor, teacher: Tensor) -> Result:
            value = loss(maps, teacher)
            return value.detach(), torch.autograd.grad(value, maps)[0]

        return run

    def ours(maps: Tensor, teacher: Tensor) -> Tensor:
        return align_rows(maps, teacher, shape.student, shape.teacher)

    def two_ops(maps: Tensor, teacher: Tensor) -> Tensor:
        return row_l2_loss(resample_rows(maps, shape.student, shape.teacher), teacher)

    def plain(maps: Tensor, teacher: Tensor) -> Tensor:
        volume = maps.unflatten(2, shape.student)
        rows = F.interpolate(volume, shape.teacher, mode="trilinear").flatten(2)
        rows = rows / rows.sum(-1, keepdim=True)
        return torch.linalg.vector_norm(rows - teacher, dim=-1).mean()

    def naive(maps: Tensor, teacher: Tensor) -> Tensor:
        return reference.row_l2_loss(reference.resample_rows(maps, shape.student, shape.teacher), teacher)

    @cache
    def wanted() -> tuple[Result, Result]:
        maps, teacher = (part.detach() for part in make(0))
        exact = graded(naive)(maps.double().requires_grad_(), teacher.double())
        return exact, graded(plain)(maps.clone().requires_grad_(), teacher)

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        for found, exact, plainly, factor in zip(result, *wanted(), (2.0, 3.0), strict=True):
            assert_error_rule(found, exact, plainly, factor=factor)

    rows = shape.batch * shape.rows
    student, teacher = math.prod(shape.student), math.prod(shape.teacher)
    return Work(
        "align_rows, forward and backward",
        shape.case,
        make,
        {
            **{name: graded(call) for name, call in roles("align_rows", _probe, ours).items()},
            TWO_OPS: graded(two_ops),
            "plain torch": graded(plain),
        },
        check,
        torch.float32,
        teacher,
        # Maps and teacher are read, the gradient is written.
        moved=4.0 * rows * (2 * student + teacher),
        operations=40.0 * rows * teacher,
        op="align_rows",
    )


def _probe() -> None:
    maps = randn(1, 1, 8, seed=0).requires_grad_()
    align_rows(maps, torch.zeros(1, 1, 12, device=maps.device), (2, 2, 2), (3, 2, 2)).backward()


@cache
def _backends() -> list[str]:
    return others("align_rows", _probe)


def plans(size: str) -> list[Plan]:
    named = ("ours", *map(label, _backends()), TWO_OPS, "plain torch")
    return [Plan(shape.case, named, lambda shape=shape: _work(shape)) for shape in ROWS[size]]
