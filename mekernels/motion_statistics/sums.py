"""What ``MotionStatistics.update`` adds to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """Running sums over the maps, any strides."""

    diagonal: Tensor
    """(H, F, F, P)."""
    rows: Tensor
    """(H, R, S) whole rows over the video tokens."""
    vision_mass: Tensor
    """(H, S) mass of every video token's row on the video."""
    tokens: Tensor
    """(R,) int64 positions of the rows in the token sequence; read only."""
