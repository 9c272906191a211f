"""The checked arguments of one call of ``attention_rows``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The arguments that schema, backends and kernels share; see :func:`mekernels.attention_rows`."""

    query: Tensor
    key: Tensor
    rows: Tensor
    columns: Tensor | None
    """(B, C) int64; None where the columns are those from ``start`` to ``stop``."""
    key_mask: Tensor | None
    key_range: Tensor | None
    start: int
    stop: int
    softmax_scale: float
    causal: bool
    fold: int
    mean: bool
    softcap: float = 0.0
    """Scores are softcap * tanh(score / softcap); 0 leaves them as they are."""
    sinks: Tensor | None = None
    """(Hq,), or (layers, Hq) if several layers are read together."""
    bias: Tensor | None = None
    """(B or 1, Hq or 1, R or 1, Nk), added to the scores of the chosen rows."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors of the call; :meth:`of` makes a call from them and :attr:`settings`."""
        return *self[:6], self.sinks, self.bias

    @property
    def settings(self) -> tuple[Any, ...]:
        """The fields that are not tensors."""
        return self[6:13]

    @classmethod
    def of(cls, tensors: Sequence[Any], settings: Sequence[Any]) -> Call:
        """Make a call from :attr:`tensors` and :attr:`settings`."""
        return cls(*tensors[:6], *settings, *tensors[6:])

    @property
    def width(self) -> int:
        """Number of chosen columns."""
        return self.stop - self.start if self.columns is None else self.columns.shape[1]

    @property
    def own(self) -> int:
        """Number of keys of one part."""
        return self.key.shape[2] // self.fold

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(B, R, C), or (B, Hq, R, C) without the mean."""
        batch, heads = self.query.shape[:2]
        inner = (self.rows.shape[1], self.width)
        return (batch, *inner) if self.mean else (batch, heads, *inner)
