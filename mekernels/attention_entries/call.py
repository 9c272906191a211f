"""The checked arguments of the ops that read entries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """A part of an attention map: some of its rows, and some of its keys in any order.

    Row i is at position i + shift. It sees a key at position p >= 0 if p is at most ``left`` positions before
    it and at most ``right`` positions after it; -1 is no limit.
    """

    query: Tensor
    """(B, Hq, R, D)."""
    key: Tensor
    """(B, Hk, C, D)."""
    lse: Tensor
    """(B, Hq, R), natural logarithm, over all keys of a row."""
    places: Tensor | None
    """(B, C) int64 positions of the keys, -1 for a key no row sees; None if they count up from ``start``."""
    bias: Tensor | None
    """(B or 1, Hq or 1, R or 1, C or 1), added to the scores."""
    start: int
    shift: int
    softmax_scale: float
    left: int
    right: int
    softcap: float
    """Scores are softcap * tanh(score / softcap); 0 leaves them as they are."""

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """(B, Hq, R, C)."""
        return *self.query.shape[:3], self.key.shape[2]
