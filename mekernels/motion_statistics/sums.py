"""What ``MotionStatistics.update`` adds to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

COLUMNS = 64
"""The columns of the rows are padded to a multiple of this, so that a kernel writes whole blocks of them."""
MAPS = 8
"""Maps that one launch adds at most."""


class Sums(NamedTuple):
    """Running sums over the maps, any strides."""

    diagonal: Tensor
    """(H, F, F, P)."""
    rows: Tensor
    """(H, R, S or more) whole rows over the video tokens; the columns from S on are padding of any value."""
    vision_mass: Tensor
    """(H, S) mass of every video token's row on the video."""
    tokens: Tensor
    """(R,) int64 positions of the rows in the token sequence; read only."""


def padded(columns: int, block: int = COLUMNS) -> int:
    """The least multiple of ``block`` that is not below ``columns``."""
    return -(-columns // block) * block
