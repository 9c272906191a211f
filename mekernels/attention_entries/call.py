"""What the ops that read entries are given, once their arguments are checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """A part of an attention map: some of its rows, and some of its keys in any order.

    Row i sees a key that lies at place p when p >= 0 and, where the attention is causal, p <= i + shift.
    """

    query: Tensor
    """(B, Hq, R, D)."""
    key: Tensor
    """(B, Hk, C, D)."""
    lse: Tensor
    """(B, Hq, R), natural logarithm, of whole rows."""
    places: Tensor | None
    """(B, C) int64 positions of the keys, -1 for one no row sees; None where they count from ``start``."""
    start: int
    shift: int
    softmax_scale: float
    causal: bool

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """(B, Hq, R, C)."""
        return *self.query.shape[:3], self.key.shape[2]
