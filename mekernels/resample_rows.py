"""Attention rows brought from one video grid to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, checks, reference
from .native import availability as native_library

aten = torch.ops.aten


def resample_rows(
    maps: Tensor, grid_in: Sequence[int], grid_out: Sequence[int], *, normalize: bool = True
) -> Tensor:
    """Trilinear resampling of attention rows with half-pixel centres, each row then scaled to sum to one.

    Args:
        maps: (B, R, S_in) floating point, S_in = F * H * W in raster order.
        grid_in: (F, H, W) of the rows.
        grid_out: (F, H, W) wanted. The weights are those of ``torch.nn.functional.interpolate`` with
            ``mode="trilinear", align_corners=False``; no smoothing when shrinking.
        normalize: divide each resampled row by its sum. A row whose sum is zero becomes zero, with zero
            gradient.

    Returns:
        (B, R, S_out), float64 for float64 input and float32 otherwise, differentiable in ``maps``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: the alignment loss of the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> mekernels.resample_rows(torch.tensor([[[1.0, 3.0]]]), (1, 1, 2), (1, 1, 4), normalize=False)
        tensor([[[1.0000, 1.5000, 2.5000, 3.0000]]])
    """
    checks.tensor("maps", maps, 3, layout="(batch, rows, tokens)")
    source, target = checks.grid("grid_in", grid_in), checks.grid("grid_out", grid_out)
    tokens = source[0] * source[1] * source[2]
    if maps.shape[2] != tokens:
        raise ValueError(f"maps must have the {tokens} tokens of grid_in {source}, got {maps.shape[2]}")
    checks.boolean("normalize", normalize)
    checks.no_functorch("resample_rows")
    backend = backends.active()
    if backend == "reference":
        result = backends.by_reference(reference.resample_rows, maps, source, target, normalize=normalize)
        return result.to(checks.accumulate_dtype(maps.dtype))
    return resample_rows_op(maps, list(source), list(target), normalize, backend)[0]


@torch.library.custom_op("mekernels::resample_rows", mutates_args=())
def resample_rows_op(
    maps: Tensor, grid_in: list[int], grid_out: list[int], normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(B, R, S_out) rows and the (B, R) sums they were divided by, 1 without ``normalize``."""
    return backends.dispatch("resample_rows", backend, maps, grid_in, grid_out, normalize)


@resample_rows_op.register_fake
def _(maps, grid_in, grid_out, normalize, backend):
    dtype = checks.accumulate_dtype(maps.dtype)
    tokens = grid_out[0] * grid_out[1] * grid_out[2]
    return maps.new_empty((*maps.shape[:2], tokens), dtype=dtype), maps.new_empty(maps.shape[:2], dtype=dtype)


@torch.library.custom_op("mekernels::resample_rows_backward", mutates_args=())
def resample_rows_backward_op(
    grad: Tensor,
    maps: Tensor,
    sums: Tensor,
    grid_in: list[int],
    grid_out: list[int],
    normalize: bool,
    backend: str,
) -> Tensor:
    """Gradient (B, R, S_in) from that of the result, the rows and the sums that the forward returned."""
    return backends.dispatch(
        "resample_rows_backward", backend, grad, maps, sums, grid_in, grid_out, normalize
    )


@resample_rows_backward_op.register_fake
def _(grad, maps, sums, grid_in, grid_out, normalize, backend):
    return maps.new_empty(maps.shape, dtype=sums.dtype)


def _setup(ctx, inputs, output) -> None:
    maps, *ctx.options = inputs
    ctx.dtype = maps.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(maps, output[1])


def _backward(ctx, grad, _):
    return resample_rows_backward_op(grad, *ctx.saved_tensors, *ctx.options).to(ctx.dtype), *[None] * 4


resample_rows_op.register_autograd(_backward, setup_context=_setup)


def _forward(maps: Tensor, grid_in: list[int], grid_out: list[int], normalize: bool) -> tuple[Tensor, Tensor]:
    batch, rows = maps.shape[:2]
    volume = maps.to(checks.accumulate_dtype(maps.dtype)).reshape(1, batch * rows, *grid_in)
    if not batch * rows:
        return volume.new_zeros((batch, rows, math.prod(grid_out))), volume.new_ones((batch, rows))
    if grid_in == grid_out:
        out = volume.clone()
    else:
        out = aten.upsample_trilinear3d(volume, grid_out, False)
    out = out.reshape(batch, rows, -1)
    if not normalize:
        return out, out.new_ones((batch, rows))
    sums = out.sum(-1)
    empty = (sums == 0)[..., None]
    return out.div_(sums.masked_fill(sums == 0, 1)[..., None]).masked_fill_(empty, 0), sums


def _gradient(
    grad: Tensor, maps: Tensor, sums: Tensor, grid_in: list[int], grid_out: list[int], normalize: bool
) -> Tensor:
    batch, rows = sums.shape
    if not batch * rows:
        return sums.new_zeros(maps.shape)
    small = _transposed(grad.to(sums.dtype), grid_in, grid_out)
    if not normalize:
        return small
    # With R the resampling, u = R^T g, c = R^T 1 and the sum s = c x, the gradient is (u - (u x / s) c) / s.
    columns = _transposed(sums.new_ones((1, 1, math.prod(grid_out))), grid_in, grid_out)
    safe = sums.masked_fill(sums == 0, 1)[..., None]
    along = (small * (maps / safe)).sum(-1, keepdim=True)
    return torch.where((sums == 0)[..., None], 0, (small - along * columns) / safe)


def _transposed(grad: Tensor, grid_in: list[int], grid_out: list[int]) -> Tensor:
    """The transpose of the resampling: (B, R, S_out) to (B, R, S_in)."""
    batch, rows = grad.shape[:2]
    if grid_in == grid_out:
        return grad.clone()
    volume, size = grad.reshape(1, batch * rows, *grid_out), [1, batch * rows, *grid_in]
    return aten.upsample_trilinear3d_backward(volume, grid_out, size, False).reshape(batch, rows, -1)


def _native_reasons(maps: Tensor, *options) -> list[str]:
    return native_library.narrow_float_reasons(maps=maps)


def _native_gradient_reasons(grad: Tensor, maps: Tensor, *options) -> list[str]:
    return native_library.narrow_float_reasons(maps=maps, grad=grad)


def _native_forward(
    maps: Tensor, grid_in: list[int], grid_out: list[int], normalize: bool
) -> tuple[Tensor, Tensor]:
    return native_library.module().resample_rows_forward(maps.float(), grid_in, grid_out, normalize=normalize)


def _native_gradient(
    grad: Tensor, maps: Tensor, sums: Tensor, grid_in: list[int], grid_out: list[int], normalize: bool
) -> Tensor:
    return native_library.module().resample_rows_backward(
        grad.float(), maps.float(), grid_in, grid_out, normalize=normalize
    )


machine = native_library.why_not
backends.register("resample_rows", "native", _native_forward, reasons=_native_reasons, machine=machine)
backends.register(
    "resample_rows_backward", "native", _native_gradient, reasons=_native_gradient_reasons, machine=machine
)
backends.register("resample_rows", "torch", _forward)
backends.register("resample_rows_backward", "torch", _gradient)
