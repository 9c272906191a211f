"""The error rule of the kernels' tests, on as much of a large result as float64 can afford."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path += [str(TESTS / "mekernels"), str(TESTS / "motionenhancer")]

from kernel_support import assert_error_rule  # noqa: E402

__all__ = ["assert_error_rule", "causal_rows", "poisoned"]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh tensor with NaN, so that an element nothing writes shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def causal_rows(query: Tensor, key: Tensor, rows: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """(B, R, C) mean over the heads of causal attention, plainly in ``dtype``; differentiable.

    Rows are (B, R) and valid; query and key have as many tokens. Only the chosen rows are computed.
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    index = rows[:, None, :, None].expand(-1, heads, -1, query.shape[3])
    picked = query.to(dtype).gather(2, index)
    keys = key.to(dtype).repeat_interleave(groups, dim=1)
    scores = picked @ keys.mT * query.shape[3] ** -0.5
    later = torch.arange(key.shape[2], device=key.device) > rows[:, None, :, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)[..., columns].mean(1)
