"""The checked arguments of the ops that read entries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A part of an attention map: some of its rows, and some of its keys in any order.

    Keys of several parts, whose masses are added, are listed part by part: equal positions are equal places.

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
    key_range: Tensor | None
    """(B, R, 2) int32, from 0 to the number of keys of a part: first position that a row sees and its end."""
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


APART = 1 << 29
"""No two places of a video are that far apart."""


class Diagonals(NamedTuple):
    """Where a video's tokens lie, and how far apart two places of a frame may be that count as one."""

    first: int
    stop: int
    period: int
    """Tokens from a place of one frame to that of the next; 0 if no diagonals are wanted."""
    band: int

    def places(self, token: Tensor, outside: int) -> Tensor:
        """Places of tokens in their frame; ``outside`` for tokens that are not of the video."""
        inside = (token >= self.first) & (token < self.stop)
        return torch.where(inside, (token - self.first) % self.period, outside)
