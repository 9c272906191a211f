"""The L2 distance between attention rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks, native, reference


def row_l2_loss(student: Tensor, teacher: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """L2 norm of each row's difference, mean over the rows of a sample, then over the samples.

    Args:
        student: (B, R, S) floating point.
        teacher: (B, R, S) floating point, any dtype.
        row_mask: (B, R) bool, True where a row counts; all rows by default. The values of other rows never
            affect the result, not even NaN.

    Returns:
        A scalar, float64 where either input is float64 and float32 otherwise, differentiable in both maps;
        the gradient of a row without difference is zero. The mean over the samples leaves out a sample
        without a valid row. If no sample is left, the loss is 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the alignment loss of the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> student = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
        >>> mekernels.row_l2_loss(student, torch.zeros(1, 2, 2))
        tensor(3.)
    """
    checks.tensor("student", student, 3, layout="(batch, rows, tokens)")
    checks.tensor("teacher", teacher, 3, layout="(batch, rows, tokens)")
    checks.shape("teacher", teacher, student.shape, meaning="(the shape of student)")
    checks.same_device("teacher", teacher, "student", student)
    check_row_mask(row_mask, student)
    checks.no_functorch("row_l2_loss")
    if backends.active() == "reference":
        return backends.by_reference(reference.row_l2_loss, student, teacher, row_mask).to(
            common_dtype(student, teacher)
        )
    return row_l2_loss_op(student, teacher, row_mask)[0]


def check_row_mask(row_mask: Tensor | None, student: Tensor) -> None:
    """Require a (B, R) bool mask of the student's rows, or none."""
    if row_mask is None:
        return
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        kind = row_mask.dtype if isinstance(row_mask, Tensor) else type(row_mask).__name__
        raise TypeError(f"row_mask must be a bool torch.Tensor, got {kind}")
    checks.shape("row_mask", row_mask, student.shape[:2], meaning="(batch, rows)")
    checks.same_device("row_mask", row_mask, "student", student)


def common_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the loss of two maps."""
    return checks.accumulate_dtype(torch.promote_types(student.dtype, teacher.dtype))


def _fake(student: Tensor, teacher: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = common_dtype(student, teacher)
    norms, weights = (student.new_empty(student.shape[:2], dtype=dtype) for _ in range(2))
    return student.new_empty((), dtype=dtype), norms, weights


def _fake_backward(grad: Tensor, student: Tensor, teacher: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    return norms.new_empty(student.shape)


row_l2_loss_op = backends.Op("row_l2_loss", _fake)
"""The loss, and for the backward the rows' (B, R) norms and weights: loss = sum(norms * weights)."""

row_l2_loss_backward_op = backends.Op("row_l2_loss_backward", _fake_backward)
"""Gradient (B, R, S) of ``student``; the gradient of ``teacher`` is its negative."""


def _save(ctx, student, teacher, row_mask, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(student, teacher, *output[1:])


def _backward(ctx, grad, *_):
    student, teacher = ctx.saved_tensors[:2]
    both = row_l2_loss_backward_op(grad, *ctx.saved_tensors, backend=ctx.backend)
    to_student, to_teacher = ctx.needs_input_grad[:2]
    return (
        both.to(student.dtype) if to_student else None,
        both.neg().to(teacher.dtype) if to_teacher else None,
    )


row_l2_loss_op.differentiable(_save, _backward)


def forward(student: Tensor, teacher: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    dtype = common_dtype(student, teacher)
    norms = torch.linalg.vector_norm(student.to(dtype) - teacher.to(dtype), dim=-1)
    if row_mask is None:
        row_mask = torch.ones_like(norms, dtype=torch.bool)
    rows = row_mask.sum(1)
    samples = (rows > 0).sum().clamp(min=1)
    weights = row_mask.to(dtype) / (rows.clamp(min=1)[:, None] * samples)
    norms = norms.masked_fill(~row_mask, 0)
    return (norms * weights).sum(), norms, weights


def backward(grad: Tensor, student: Tensor, teacher: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    """The backward in plain torch."""
    counts = ((norms != 0) & (weights > 0))[..., None]
    # Dividing first keeps tiny norms from overflowing.
    unit = (student.to(norms.dtype) - teacher.to(norms.dtype)) / norms.masked_fill(norms == 0, 1)[..., None]
    return torch.where(counts, unit * (grad * weights)[..., None], 0)


def _native_reasons(student: Tensor, teacher: Tensor, row_mask: Tensor | None) -> list[str]:
    return native.narrow_float_reasons(student=student, teacher=teacher)


def _native_forward(
    student: Tensor, teacher: Tensor, row_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return native.row_l2_loss_forward(student.float(), teacher, row_mask)


def _native_backward_reasons(
    grad: Tensor, student: Tensor, teacher: Tensor, norms: Tensor, weights: Tensor
) -> list[str]:
    return native.narrow_float_reasons(student=student, teacher=teacher, norms=norms)


def _native_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, norms: Tensor, weights: Tensor
) -> Tensor:
    return native.row_l2_loss_backward(grad.float(), student.float(), teacher, norms, weights)


for name, fast, reasons, plain in (
    ("row_l2_loss", _native_forward, _native_reasons, forward),
    ("row_l2_loss_backward", _native_backward, _native_backward_reasons, backward),
):
    backends.register(name, "native", fast, reasons=reasons, machine=native.machine)
    backends.register(name, "torch", plain)
