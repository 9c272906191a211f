"""The distance of resampled student rows from a teacher's, without the resampled rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks, reference, resample_rows, row_l2_loss
from .native import availability as native_library


def align_rows(
    student: Tensor,
    teacher: Tensor,
    grid_in: Sequence[int],
    grid_out: Sequence[int],
    row_mask: Tensor | None = None,
) -> Tensor:
    """Row L2 loss of the resampled student rows and the teacher's, both scaled to sum to one.

    The gradient is made along with the loss and is as small as ``student``: the native library never holds a
    resampled map, and nothing but that gradient is kept for the backward.

    Args:
        student: (B, R, S_in) floating point, S_in = F * H * W in raster order.
        teacher: (B, R, S_out) floating point, any dtype; has no gradient.
        grid_in: (F, H, W) of the student's rows.
        grid_out: (F, H, W) of the teacher's rows.
        row_mask: (B, R) bool, True where a row counts; all rows by default. What the others hold is never
            read into the result, NaN included.

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
    backend = backends.active()
    if backend == "reference":
        result = backends.by_reference(reference.align_rows, student, teacher, source, target, row_mask)
        return result.to(row_l2_loss.common_dtype(student, teacher))
    gradient = torch.is_grad_enabled() and student.requires_grad
    return align_rows_op(student, teacher, row_mask, list(source), list(target), gradient, backend)[0]


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
        "teacher", teacher, (batch, rows, volumes[1]), meaning="(those of student, F * H * W of grid_out)"
    )
    checks.same_device("teacher", teacher, "student", student)
    if teacher.requires_grad:
        raise ValueError("teacher must not require a gradient, got one that does: use row_l2_loss")
    row_l2_loss.check_row_mask(row_mask, student)
    return source, target


@torch.library.custom_op("mekernels::align_rows", mutates_args=())
def align_rows_op(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    grid_in: list[int],
    grid_out: list[int],
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the rows' (B, R) weights in it, and the gradients of their norms, (B, R, S_in) or (0,)."""
    return backends.dispatch("align_rows", backend, student, teacher, row_mask, grid_in, grid_out, gradient)


@align_rows_op.register_fake
def _(student, teacher, row_mask, grid_in, grid_out, gradient, backend):
    dtype = row_l2_loss.common_dtype(student, teacher)
    weights = student.new_empty(student.shape[:2], dtype=dtype)
    saved = student.new_empty(student.shape if gradient else (0,), dtype=dtype)
    return student.new_empty((), dtype=dtype), weights, saved


@torch.library.custom_op("mekernels::align_rows_backward", mutates_args=())
def align_rows_backward_op(grad: Tensor, weights: Tensor, row_gradient: Tensor, backend: str) -> Tensor:
    """Gradient (B, R, S_in) of the student from what the forward returned."""
    return backends.dispatch("align_rows_backward", backend, grad, weights, row_gradient)


@align_rows_backward_op.register_fake
def _(grad, weights, row_gradient, backend):
    return torch.empty_like(row_gradient)


def _setup(ctx, inputs, output) -> None:
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):
    result = align_rows_backward_op(grad, *ctx.saved_tensors, ctx.backend)
    return result.to(ctx.dtype), *[None] * 6


align_rows_op.register_autograd(_backward, setup_context=_setup)


def _forward(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    grid_in: list[int],
    grid_out: list[int],
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = row_l2_loss.common_dtype(student, teacher)
    maps = student.to(dtype)
    rows, sums = resample_rows._forward(maps, grid_in, grid_out, True)
    target = reference.scaled_to_one(teacher.to(dtype))
    loss, norms, weights = row_l2_loss._forward(rows, target, row_mask)
    if not gradient:
        return loss, weights, student.new_empty(0, dtype=dtype)
    one = torch.ones_like(loss)
    unit = row_l2_loss._gradient(one, rows, target, norms, (weights > 0).to(dtype))
    row_gradient = resample_rows._gradient(unit, maps, sums, grid_in, grid_out, True)
    return loss, weights, row_gradient


def _gradient(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> Tensor:
    return torch.where((weights > 0)[..., None], row_gradient * (grad * weights)[..., None], 0)


def _native_reasons(student: Tensor, teacher: Tensor, *options) -> list[str]:
    return native_library.narrow_float_reasons(student=student, teacher=teacher)


def _native_forward(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    grid_in: list[int],
    grid_out: list[int],
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, weights, row_gradient = native_library.module().align_forward(
        student.float(), teacher, grid_in, grid_out, row_mask, gradient=gradient
    )
    return loss, weights, row_gradient if gradient else loss.new_empty(0)


def _native_gradient_reasons(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> list[str]:
    return native_library.narrow_float_reasons(row_gradient=row_gradient)


def _native_gradient(grad: Tensor, weights: Tensor, row_gradient: Tensor) -> Tensor:
    return native_library.module().align_backward(grad.float(), row_gradient, weights)


machine = native_library.why_not
backends.register("align_rows", "native", _native_forward, reasons=_native_reasons, machine=machine)
backends.register(
    "align_rows_backward", "native", _native_gradient, reasons=_native_gradient_reasons, machine=machine
)
backends.register("align_rows", "torch", _forward)
backends.register("align_rows_backward", "torch", _gradient)
