"""The sums to which ``MotionStatistics.update`` adds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

COLUMNS = 64
"""The number of columns of the rows is padded to a multiple of this, so that kernels write whole blocks."""
MAPS = 8
"""Maximum number of maps that one launch adds."""


class Sums(NamedTuple):
    """Running sums over the maps, with any strides."""

    diagonal: Tensor
    """(H, F, F, P)."""
    rows: Tensor
    """(H, R, S or more) whole rows over the video tokens; columns from S on are padding with any value."""
    vision_mass: Tensor
    """(H, S) attention mass of every video token on the video."""
    tokens: Tensor
    """(R,) int64 positions of the rows in the token sequence; read only."""


def padded(columns: int, block: int = COLUMNS) -> int:
    """The smallest multiple of ``block`` that is at least ``columns``."""
    return -(-columns // block) * block
