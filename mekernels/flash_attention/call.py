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
    """Whether key i + Nk - Nq is the last one that row i sees."""
    left: int = -1
    """Keys that a row sees before key i + Nk - Nq; -1 for no limit."""
    right: int = -1
    """Keys that a row sees after it, unless ``causal``; -1 for no limit."""
    softcap: float = 0.0
    """Scores are softcap * tanh(score / softcap); 0 leaves them as they are."""

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and to the right, with the causal mask; -1 for no limit."""
        return self.left, 0 if self.causal else self.right

    @property
    def slides(self) -> bool:
        """Whether the window hides more than the causal mask does."""
        return self.left >= 0 or self.window[1] > 0

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Key and value, repeated to one head for every query head, for kernels without grouped heads."""
        if self.groups == 1:
            return self.key, self.value
        return self.key.repeat_interleave(self.groups, 1), self.value.repeat_interleave(self.groups, 1)
