"""How strongly each head attends to the same place over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, checks, native, reference


@dataclass(frozen=True)
class MotionScores:
    """The three metrics of every head, each (H,) float32 (float64 for float64 input).

    Example:
        >>> import torch, mekernels
        >>> scores = mekernels.MotionScores(*torch.tensor([[3.0, 1], [2, 1], [0.5, 0.5]]))
        >>> scores.composite()
        tensor([ 2., -2.])
    """

    dfc: Tensor
    """Squared attention on the diagonals over squared attention off them."""
    tcs: Tensor
    """Mean length of the runs of frames above the mean attention."""
    dsr: Tensor
    """Share of the diagonals at or above the mean attention."""

    def composite(self) -> Tensor:
        """Sum of the metrics, each standardised over the heads (population deviation), (H,).

        A metric that is the same for all heads contributes 0. An infinite DFC counts as the largest finite
        DFC of the heads.
        """
        total = sum(_standardise(metric.double()) for metric in (self.dfc, self.tcs, self.dsr))
        assert isinstance(total, Tensor)
        return total.to(self.dfc.dtype)


def _standardise(metric: Tensor) -> Tensor:
    finite = torch.isfinite(metric)
    largest = torch.where(finite, metric, -math.inf).amax()
    metric = torch.where((metric == math.inf) & finite.any(), largest, metric)
    constant = metric.amax() == metric.amin()
    deviation = torch.where(constant, 1.0, metric.std(correction=0))
    return torch.where(constant, 0.0, (metric - metric.mean()) / deviation)


def motion_scores(diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor) -> MotionScores:
    """DFC, TCS and DSR of every head.

    Args:
        diagonal: (H, F, F, P) pooled attention of token (f, p) to token (g, p), floating point.
        mean_attention: (H,) mean of the whole vision-to-vision block; it is the threshold.
        square_sum: (H,) sum of all squares of that block, including the entries of ``diagonal``.

    Returns:
        MotionScores with

        - DFC: the sum of squares on the diagonals divided by the sum of squares off them. If nothing is off
          them (always for P = 1), it is inf, or 0 if the diagonals are zero too. Never negative.
        - TCS: each position has an F x F matrix. Its value is the mean length of all maximal runs of
          consecutive g, in the rows f, with entries > ``mean_attention``; 0 without runs. TCS is the mean
          over the positions.
        - DSR: share of the F * F * P entries that are >= ``mean_attention``.

        float64 for float64 ``diagonal`` and float32 otherwise. A NaN among a head's inputs makes the scores
        that depend on it NaN. Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: motion-sensitive head selection in the paper "MotionEnhancer" (CVPR 2026, arXiv 2606.06853).

    Example:
        >>> import torch, mekernels
        >>> diagonal = torch.eye(2).reshape(1, 2, 2, 1).expand(1, 2, 2, 3)
        >>> mekernels.motion_scores(diagonal, torch.tensor([0.5]), torch.tensor([8.0]))
        MotionScores(dfc=tensor([3.]), tcs=tensor([1.]), dsr=tensor([0.5000]))
    """
    checks.tensor("diagonal", diagonal, 4, layout="(heads, frames, frames, positions)")
    heads, frames, others, _ = diagonal.shape
    if frames != others or not diagonal.numel():
        wanted = "(heads, frames, frames, positions), none zero"
        raise ValueError(f"diagonal must have shape {wanted}, got {tuple(diagonal.shape)}")
    for name, value in (("mean_attention", mean_attention), ("square_sum", square_sum)):
        checks.tensor(name, value, 1, layout="(heads,)")
        checks.shape(name, value, (heads,), meaning="(heads,)")
        checks.same_device(name, value, "diagonal", diagonal)
    if backends.active() == "reference":
        dtype = checks.accumulate_dtype(diagonal.dtype)
        triple = backends.by_reference(reference.motion_scores, diagonal, mean_attention, square_sum)
        return MotionScores(*(metric.to(dtype) for metric in triple))
    return MotionScores(*motion_scores_op(diagonal, mean_attention, square_sum))


def _fake(diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulate_dtype(diagonal.dtype)
    dfc, tcs, dsr = (diagonal.new_empty(diagonal.shape[:1], dtype=dtype) for _ in range(3))
    return dfc, tcs, dsr


motion_scores_op = backends.Op("motion_scores", _fake)
"""DFC, TCS and DSR, each (H,)."""


def _composite(diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulate_dtype(diagonal.dtype)
    several = diagonal.shape[-1] > 1
    scores = []
    for head, values in enumerate(diagonal):
        tau = mean_attention[head]
        above = values > tau
        runs = above[:, 0].sum(0) + (above[:, 1:] & ~above[:, :-1]).sum((0, 1))
        inside = values.double().square().sum()
        outside = square_sum[head].double() - inside if several else torch.zeros_like(inside)
        consistency = (above.sum((0, 1)) / runs.clamp(min=1).double()).mean()
        share = (values >= tau).double().mean()
        # A sum of squares is NaN exactly when an entry is.
        lost = inside.isnan() | tau.isnan()
        scores.append(
            (
                energy_ratio(inside, outside),
                torch.where(lost, math.nan, consistency),
                torch.where(lost, math.nan, share),
            )
        )
    dfc, tcs, dsr = (torch.stack(metric).to(dtype) for metric in zip(*scores, strict=True))
    return dfc, tcs, dsr


def energy_ratio(inside: Tensor, outside: Tensor) -> Tensor:
    """inside / outside. With outside 0 it is inf, or 0 if inside is 0 too. NaN stays NaN."""
    nothing_outside = torch.where(inside > 0, math.inf, 0.0).to(inside.dtype)
    ratio = torch.where(outside <= 0, nothing_outside, inside / outside)
    return torch.where(inside.isnan(), math.nan, ratio)


def _native_reasons(diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor) -> list[str]:
    reasons = native.device_reasons(diagonal.device)
    for name, value in (
        ("diagonal", diagonal),
        ("mean_attention", mean_attention),
        ("square_sum", square_sum),
    ):
        if value.dtype != torch.float32:
            reasons.append(f"{name} must be float32, is {value.dtype}")
    return reasons


def _native(diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return native.motion_scores(diagonal.contiguous(), mean_attention.contiguous(), square_sum.contiguous())


backends.register("motion_scores", "native", _native, reasons=_native_reasons, machine=native.machine)
backends.register("motion_scores", "torch", _composite)
