"""The distance between resampled student rows and teacher rows, without storing the resampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, native, reference
from .resample_rows import Resampling
from .resample_rows import backward as resample_backward
from .resample_rows import forward as resample_forward
from .row_l2_loss import backward as l2_backward
from .row_l2_loss import check_row_mask, common_dtype
from .row_l2_loss import forward as l2_forward


def align_rows(
    student: Tensor,
    teacher: Tensor,
    grid_in: Sequence[int],
    grid_out: Sequence[int],
    row_mask: Tensor | None = None,
) -> Tensor:
    """Row L2 loss between the resampled student rows and the teacher rows, both scaled to sum to one.

    The forward computes the gradient along with the loss. The gradient has the shape of ``student``, and only
    it is kept for the backward. The native library never stores a resampled map.

    Args:
        student: (B, R, S_in) floating point, S_in = F * H * W in raster order.
        teacher: (B, R, S_out) floating point, any dtype; has no gradient.
        grid_in: (F, H, W) of the student's rows.
        grid_out: (F, H, W) of the teacher's rows.
        row_mask: (B, R) bool, True where a row counts; all rows by default. The values of other rows never
            affect the result, not even NaN.

    Returns:
        A scalar, float64 where either input is float64 and float32 otherwise, differentiable in ``student``.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``teacher`` requires a gradient; the message names
            it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the alignment loss of the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch
        >>> from mekernels import align_rows
        >>> align_rows(torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), (1, 1, 2), (1, 1, 4))
        tensor(0.8660)
    """
    source, target = _check(student, teacher, grid_in, grid_out, row_mask)
    checks.no_functorch("align_rows")
    if backends.active() == "reference":
        result = backends.by_reference(reference.align_rows, student, teacher, source, target, row_mask)
        return result.to(common_dtype(student, teacher))
    gradient = torch.is_grad_enabled() and student.requires_grad
    return align_rows_op(Call(student, teacher, row_mask, list(source), list(target), gradient))[0]


def _check(
    student: Tensor,
    teacher: Tensor,
    grid_in: Sequence[int],
    grid_out: Sequence[int],
    row_mask: Tensor | None,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    checks.tensor("student", student, 3, layout="(batch, rows, tokens)")
    checks.tensor("teacher", teacher, 3, layout="(batch, rows, tokens)")
    source, target = checks.grid("grid_in", grid_in), checks.grid("grid_out", grid_out)
    volumes = [frames * height * width for frames, height, width in (source, target)]
    batch, rows = student.shape[:2]
    checks.shape("student", student, (batch, rows, volumes[0]), meaning="(batch, rows, F * H * W of grid_in)")
    checks.shape(
        "teacher",
        teacher,
        (batch, rows, volumes[1]),
        meaning="(batch, rows of student, F * H * W of grid_out)",
    )
    checks.same_device("teacher", teacher, "student", student)
    if teacher.requires_grad:
        raise ValueError("teacher must not require a gradient, got one that does: use row_l2_loss")
    check_row_mask(row_mask, student)
    return source, target


class Call(NamedTuple):
    """The arguments of one call of the op."""

    student: Tensor
    teacher: Tensor
    row_mask: Tensor | None
    grid_in: list[int]
    grid_out: list[int]
    gradient: bool
    """Whether the gradient is made along with the loss."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss."""
        return common_dtype(self.student, self.teacher)


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    student, dtype = call.student, call.dtype
    weights = student.new_empty(student.shape[:2], dtype=dtype)
    saved = student.new_empty(student.shape if call.gradient else (0,), dtype=dtype)
    return student.new_empty((), dtype=dtype), weights, saved


def _fake_backward(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> Tensor:
    return torch.empty_like(row_gradient)


align_rows_op = backends.Op("align_rows", _fake)
"""The loss, the rows' (B, R) weights in it, and the gradients of their norms, (B, R, S_in) or (0,)."""

align_rows_backward_op = backends.Op("align_rows_backward", _fake_backward)
"""Gradient (B, R, S_in) of the student from what the forward returned."""


def _save(ctx, call, output) -> None:
    ctx.dtype = call.student.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):
    return (align_rows_backward_op(grad, *ctx.saved_tensors, backend=ctx.backend).to(ctx.dtype),)


align_rows_op.differentiable(_save, _backward)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    maps, to = call.student.to(call.dtype), Resampling(call.grid_in, call.grid_out, True)
    rows, sums = resample_forward(maps, to)
    target = reference.scaled_to_one(call.teacher.to(call.dtype))
    loss, norms, weights = l2_forward(rows, target, call.row_mask)
    if not call.gradient:
        return loss, weights, maps.new_empty(0)
    unit = l2_backward(torch.ones_like(loss), rows, target, norms, (weights > 0).to(call.dtype))
    return loss, weights, resample_backward(unit, maps, sums, to)


def backward(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> Tensor:
    """The backward in plain torch."""
    return torch.where((weights > 0)[..., None], row_gradient * (grad * weights)[..., None], 0)


def _native_reasons(call: Call) -> list[str]:
    return native.narrow_float_reasons(student=call.student, teacher=call.teacher)


def _native_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    grids = (call.grid_in, call.grid_out)
    loss, _, weights, row_gradient = native.align_forward(
        call.student.float(), call.teacher, *grids, call.row_mask, gradient=call.gradient
    )
    return loss, weights, loss.new_empty(0) if row_gradient is None else row_gradient


def _native_backward_reasons(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> list[str]:
    return native.narrow_float_reasons(row_gradient=row_gradient)


def _native_backward(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> Tensor:
    return native.align_backward(grad.float(), row_gradient, weights)


for name, fast, reasons, plain in (
    ("align_rows", _native_forward, _native_reasons, forward),
    ("align_rows_backward", _native_backward, _native_backward_reasons, backward),
):
    backends.register(name, "native", fast, reasons=reasons, machine=native.machine)
    backends.register(name, "torch", plain)
