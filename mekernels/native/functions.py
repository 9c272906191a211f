"""The compiled kernels on torch tensors.

Plain functions without autograd. They take strided tensors of one device and return new tensors. They run on
torch's threads on the CPU and on the current stream on CUDA. Every function raises ``TypeError`` on a wrong
dtype, ``ValueError`` on shapes or devices that do not fit, and :class:`NativeLoadError` if the device has no
library. Sections refer to the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import DTYPES, run

Grid = tuple[int, int, int]
_FLOAT32 = (torch.float32,)
_HALVES = (torch.float32, torch.float16, torch.bfloat16)


def _tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | str, ...],
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = _FLOAT32,
) -> Tensor:
    """Check dtype, shape and device of a tensor and make it contiguous; named sizes of the shape are free."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    fits = len(shape) == value.ndim and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value.detach().contiguous()


def _grid(name: str, grid: Sequence[int]) -> Grid:
    if len(grid) != 3 or any(isinstance(size, bool) or not isinstance(size, int) for size in grid):
        raise TypeError(f"{name} must be three integers (frames, height, width), got {grid!r}")
    if min(grid) < 1:
        raise ValueError(f"{name} must be at least 1 in every dimension, got {tuple(grid)}")
    return grid[0], grid[1], grid[2]


def _volume(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _mask(row_mask: Tensor | None, rows: tuple[int, int], device: torch.device) -> Tensor | None:
    return None if row_mask is None else _tensor("row_mask", row_mask, rows, device, (torch.bool,))


def _row_weights(row_mask: Tensor | None, rows: tuple[int, int], device: torch.device) -> Tensor:
    """Weight (B, R) of each row's norm, for the mean over a sample's rows, then over samples with any row."""
    if row_mask is None:
        row_mask = torch.ones(rows, dtype=torch.bool, device=device)
    kept = row_mask.to(torch.float32)
    count = kept.sum(-1, keepdim=True)
    return kept / count.clamp(min=1) / (count > 0).sum().clamp(min=1)


def motion_scores(
    diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal focus, temporal consistency and diagonal saliency of every head (Section 3), in one pass.

    Args:
        diagonal: (H, F, F, P) float32; entry [h, f, g, p] is the pooled attention from (f, p) to (g, p).
        mean_attention: (H,) float32, mean of the head's vision-to-vision block: the threshold tau.
        square_sum: (H,) float32, sum of all squares of that block.

    Returns:
        ``(dfc, tcs, dsr)``, each (H,) float32. DFC is inf if nothing is off the diagonal, and 0 if
        nothing is on it either. A NaN among a head's inputs makes the scores that depend on it NaN.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> diagonal = torch.ones(1, 2, 2, 3)
        >>> native.motion_scores(diagonal, torch.tensor([0.5]), torch.tensor([24.0]))
        (tensor([1.]), tensor([2.]), tensor([1.]))
    """
    diagonal = _tensor("diagonal", diagonal, ("H", "F", "F", "P"))
    heads, frames, others, positions = diagonal.shape
    if frames != others or not frames or not positions:
        raise ValueError(
            f"diagonal must have shape (H, F, F, P), F and P at least 1, got {tuple(diagonal.shape)}"
        )
    device = diagonal.device
    mean_attention = _tensor("mean_attention", mean_attention, (heads,), device)
    square_sum = _tensor("square_sum", square_sum, (heads,), device)
    dfc, tcs, dsr = (torch.empty(heads, dtype=torch.float32, device=device) for _ in range(3))
    if heads:
        sizes = [heads, frames, positions]
        run("motion_scores", device, [diagonal, mean_attention, square_sum, *sizes, dfc, tcs, dsr], sizes)
    return dfc, tcs, dsr


def token_motion_scores(text_attention: Tensor, frames: int) -> Tensor:
    """Motion score of every text token (Section 3): mean attention per frame, averaged, plus its mean change.

    Args:
        text_attention: (T, F * P) float32, float16 or bfloat16, frames outermost.
        frames: F.

    Returns:
        (T,) float32; with one frame the change is 0.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> native.token_motion_scores(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), frames=2)
        tensor([1.5000])
    """
    text_attention = _tensor("text_attention", text_attention, ("T", "F * P"), dtypes=_HALVES)
    tokens, vision = text_attention.shape
    if isinstance(frames, bool) or not isinstance(frames, int):
        raise TypeError(f"frames must be an int, got {type(frames).__name__}")
    if frames < 1 or not vision or vision % frames:
        raise ValueError(f"frames must divide the columns of text_attention ({vision}), got {frames}")
    device = text_attention.device
    scores = torch.empty(tokens, dtype=torch.float32, device=device)
    if tokens:
        sizes = [tokens, frames, vision // frames]
        dtype = _dtype(text_attention)
        run("token_motion_scores", device, [text_attention, dtype, *sizes, scores], sizes)
    return scores


def _dtype(value: Tensor) -> int:
    return DTYPES[str(value.dtype).removeprefix("torch.")]


def resample_rows_forward(
    maps: Tensor, grid_in: Sequence[int], grid_out: Sequence[int], *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Trilinear resampling with half-pixel centres, then each row scaled to sum to one (Section 3).

    Args:
        maps: (B, R, S_in) float32, rows of volumes in raster order.
        grid_in: (frames, height, width) with product S_in.
        grid_out: (frames, height, width) of the result.
        normalize: scale each row to sum to one; a row that sums to zero becomes zero.

    Returns:
        ``(resampled, sums)``: (B, R, S_out) and (B, R) float32. Each row was divided by its sum, which is 1
        without ``normalize``.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> native.resample_rows_forward(torch.ones(1, 1, 2), (1, 1, 2), (1, 1, 4))
        (tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]]), tensor([[4.]]))
    """
    grids = _grid("grid_in", grid_in), _grid("grid_out", grid_out)
    maps = _tensor("maps", maps, ("B", "R", _volume(grids[0])))
    batch, rows, _ = maps.shape
    resampled, sums = maps.new_empty(batch, rows, _volume(grids[1])), maps.new_empty(batch, rows)
    if batch * rows:
        sizes = [batch * rows, *grids[0], *grids[1]]
        run("resample_rows", maps.device, [maps, *sizes, int(normalize), resampled, sums], sizes)
    return resampled, sums


def resample_rows_backward(
    grad: Tensor, maps: Tensor, grid_in: Sequence[int], grid_out: Sequence[int], *, normalize: bool = True
) -> Tensor:
    """Gradient of :func:`resample_rows_forward` in ``maps``.

    Args:
        grad: (B, R, S_out) float32, gradient of the result.
        maps: (B, R, S_in) float32, as in the forward; read only with ``normalize``.
        grid_in, grid_out, normalize: as in the forward.

    Returns:
        (B, R, S_in) float32; zero for a row that was set to zero.
    """
    grids = _grid("grid_in", grid_in), _grid("grid_out", grid_out)
    grad = _tensor("grad", grad, ("B", "R", _volume(grids[1])))
    batch, rows, _ = grad.shape
    maps = _tensor("maps", maps, (batch, rows, _volume(grids[0])), grad.device)
    result = torch.empty_like(maps)
    if batch * rows:
        sizes = [batch * rows, *grids[0], *grids[1]]
        run("resample_rows_backward", grad.device, [grad, maps, *sizes, int(normalize), result], sizes)
    return result


def row_l2_loss_forward(
    student: Tensor, teacher: Tensor, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L2 norm of every row's difference (Section 3).

    The mean is taken over the rows of each sample, then over the samples that have any row.

    Args:
        student: (B, R, S) float32.
        teacher: (B, R, S) float32, float16 or bfloat16.
        row_mask: (B, R) bool, True where a row counts; other rows are never read. All rows by default.

    Returns:
        ``(loss, norms, weights)``: (), (B, R) and (B, R) float32; the loss is the sum of norms * weights,
        both 0 where the mask is False.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> native.row_l2_loss_forward(torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
        (tensor(2.), tensor([[2.]]), tensor([[1.]]))
    """
    student = _tensor("student", student, ("B", "R", "S"))
    batch, rows, columns = student.shape
    device = student.device
    teacher = _tensor("teacher", teacher, (batch, rows, columns), device, _HALVES)
    row_mask = _mask(row_mask, (batch, rows), device)
    norms = student.new_empty(batch, rows)
    if student.numel():
        run("row_l2", device, [student, teacher, _dtype(teacher), row_mask, batch * rows, columns, norms])
    weights = _row_weights(row_mask, (batch, rows), device)
    return (norms * weights).sum(), norms, weights


def row_l2_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, norms: Tensor, weights: Tensor
) -> Tensor:
    """Gradient of :func:`row_l2_loss_forward` in ``student``; the gradient in ``teacher`` is its negative.

    Args:
        grad: () float32, gradient of the loss.
        student, teacher: as in the forward.
        norms, weights: (B, R) float32, from the forward.

    Returns:
        (B, R, S) float32; zero where a row's difference or weight is zero.
    """
    student = _tensor("student", student, ("B", "R", "S"))
    batch, rows, columns = student.shape
    device = student.device
    teacher = _tensor("teacher", teacher, (batch, rows, columns), device, _HALVES)
    norms = _tensor("norms", norms, (batch, rows), device)
    weights = _tensor("weights", weights, (batch, rows), device)
    row_mask, grad_norms = weights != 0, _tensor("grad", grad, (), device) * weights
    result = torch.empty_like(student)
    if student.numel():
        values = [
            student,
            teacher,
            _dtype(teacher),
            row_mask,
            norms,
            grad_norms,
            batch * rows,
            columns,
            result,
        ]
        run("row_l2_backward", device, values)
    return result


def align_forward(
    student: Tensor,
    teacher: Tensor,
    grid_in: Sequence[int],
    grid_out: Sequence[int],
    row_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    normalize_teacher: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row L2 loss between resampled student rows and teacher rows, without the resampled map (Section 3).

    Equals :func:`resample_rows_forward` followed by :func:`row_l2_loss_forward`. One pass over the
    teacher computes both the loss and the gradient, which has the shape of ``student``.

    Args:
        student: (B, R, S_in) float32.
        teacher: (B, R, S_out) float32, float16 or bfloat16.
        grid_in: (frames, height, width) of the student's rows.
        grid_out: (frames, height, width) of the teacher's rows.
        row_mask: (B, R) bool, True where a row counts; other rows are never read. All rows by default.
        normalize: scale the student's resampled rows to sum to one.
        normalize_teacher: scale the teacher's rows in the same way.
        gradient: also return ``row_gradient``, which :func:`align_backward` needs.

    Returns:
        ``(loss, norms, weights, row_gradient)``: (), (B, R), (B, R) and (B, R, S_in) float32. The loss is
        the sum of norms * weights; ``row_gradient[b, r]`` is the gradient of ``norms[b, r]`` in
        ``student[b, r]``, None without ``gradient``.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> student, teacher = torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
        >>> loss, norms, weights, row_gradient = native.align_forward(student, teacher, (1, 1, 2), (1, 1, 4))
        >>> loss, row_gradient.shape
        (tensor(0.8660), torch.Size([1, 1, 2]))
    """
    grids = _grid("grid_in", grid_in), _grid("grid_out", grid_out)
    student = _tensor("student", student, ("B", "R", _volume(grids[0])))
    batch, rows, _ = student.shape
    device = student.device
    teacher = _tensor("teacher", teacher, (batch, rows, _volume(grids[1])), device, _HALVES)
    row_mask = _mask(row_mask, (batch, rows), device)
    norms = student.new_empty(batch, rows)
    row_gradient = torch.empty_like(student) if gradient else None
    if batch * rows:
        sizes = [batch * rows, *grids[0], *grids[1]]
        flags = [int(normalize), int(normalize_teacher)]
        values = [student, teacher, _dtype(teacher), row_mask, *sizes, *flags, norms, row_gradient]
        run("align", device, values, sizes)
    weights = _row_weights(row_mask, (batch, rows), device)
    return (norms * weights).sum(), norms, weights, row_gradient


def align_backward(grad: Tensor, row_gradient: Tensor, weights: Tensor) -> Tensor:
    """Gradient of :func:`align_forward`'s loss in ``student``.

    Args:
        grad: () float32, gradient of the loss.
        row_gradient: (B, R, S_in) float32, from the forward.
        weights: (B, R) float32, from the forward.

    Returns:
        (B, R, S_in) float32.
    """
    row_gradient = _tensor("row_gradient", row_gradient, ("B", "R", "S_in"))
    batch, rows, columns = row_gradient.shape
    device = row_gradient.device
    grad_norms = _tensor("grad", grad, (), device) * _tensor("weights", weights, (batch, rows), device)
    result = torch.empty_like(row_gradient)
    if row_gradient.numel():
        run("align_backward", device, [row_gradient, grad_norms, batch * rows, columns, result])
    return result
