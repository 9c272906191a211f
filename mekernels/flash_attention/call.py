"""The checked arguments of one call of ``flash_attention``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""Output and logsumexp."""


class Call(NamedTuple):
    """The arguments that all backends share; see :func:`mekernels.flash_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    causal: bool

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Key and value, repeated to one head for every query head, for kernels without grouped heads."""
        if self.groups == 1:
            return self.key, self.value
        return self.key.repeat_interleave(self.groups, 1), self.value.repeat_interleave(self.groups, 1)
