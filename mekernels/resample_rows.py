"""Resampling of attention rows from one video grid to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, native, reference

aten = torch.ops.aten


def resample_rows(
    maps: Tensor, grid_in: Sequence[int], grid_out: Sequence[int], *, normalize: bool = True
) -> Tensor:
    """Trilinear resampling of attention rows with half-pixel centres. Each row is then scaled to sum to one.

    Args:
        maps: (B, R, S_in) floating point, S_in = F * H * W in raster order.
        grid_in: (F, H, W) of the rows.
        grid_out: (F, H, W) of the result. The weights equal ``torch.nn.functional.interpolate`` with
            ``mode="trilinear", align_corners=False``; there is no smoothing when the grid shrinks.
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
    if backends.active() == "reference":
        result = backends.by_reference(reference.resample_rows, maps, source, target, normalize=normalize)
        return result.to(checks.accumulate_dtype(maps.dtype))
    return resample_rows_op(maps, Resampling(list(source), list(target), normalize))[0]


class Resampling(NamedTuple):
    """The grids before and after, and whether rows are scaled to sum to one."""

    grid_in: list[int]
    grid_out: list[int]
    normalize: bool


def _fake(maps: Tensor, to: Resampling) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(maps.dtype)
    frames, height, width = to.grid_out
    resampled = maps.new_empty((*maps.shape[:2], frames * height * width), dtype=dtype)
    return resampled, maps.new_empty(maps.shape[:2], dtype=dtype)


def _fake_backward(grad: Tensor, maps: Tensor, sums: Tensor, to: Resampling) -> Tensor:
    return maps.new_empty(maps.shape, dtype=sums.dtype)


resample_rows_op = backends.Op("resample_rows", _fake)
"""(B, R, S_out) rows, and the (B, R) sums by which they were divided: 1 without ``normalize``."""

resample_rows_backward_op = backends.Op("resample_rows_backward", _fake_backward)
"""Gradient (B, R, S_in) from the gradient of the result and the forward's rows and sums."""


def _save(ctx, maps, to, output) -> None:
    ctx.resampling, ctx.dtype = to, maps.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(maps, output[1])


def _backward(ctx, grad, _):
    result = resample_rows_backward_op(grad, *ctx.saved_tensors, ctx.resampling, backend=ctx.backend)
    return (result.to(ctx.dtype),)


resample_rows_op.differentiable(_save, _backward)


def forward(maps: Tensor, to: Resampling) -> tuple[Tensor, Tensor]:
    """The op in plain torch."""
    grid_in, grid_out, normalize = to
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


def backward(grad: Tensor, maps: Tensor, sums: Tensor, to: Resampling) -> Tensor:
    """The backward in plain torch."""
    grid_in, grid_out, normalize = to
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


def _native_reasons(maps: Tensor, to: Resampling) -> list[str]:
    return native.narrow_float_reasons(maps=maps)


def _native_backward_reasons(grad: Tensor, maps: Tensor, *_) -> list[str]:
    return native.narrow_float_reasons(maps=maps, grad=grad)


def _native_forward(maps: Tensor, to: Resampling) -> tuple[Tensor, Tensor]:
    return native.resample_rows_forward(maps.float(), to.grid_in, to.grid_out, normalize=to.normalize)


def _native_backward(grad: Tensor, maps: Tensor, sums: Tensor, to: Resampling) -> Tensor:
    return native.resample_rows_backward(
        grad.float(), maps.float(), to.grid_in, to.grid_out, normalize=to.normalize
    )


for name, fast, reasons, plain in (
    ("resample_rows", _native_forward, _native_reasons, forward),
    ("resample_rows_backward", _native_backward, _native_backward_reasons, backward),
):
    backends.register(name, "native", fast, reasons=reasons, machine=native.machine)
    backends.register(name, "torch", plain)
