"""The arguments of ops that read a video's attention from its logsumexp."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..layout import VideoTokens


class Call(NamedTuple):
    """The arguments that schema, backends and kernels share; see :func:`mekernels.diagonal_attention`."""

    query: Tensor
    key: Tensor
    lse: Tensor
    frames: int
    positions: int
    start: int
    """The first video token."""
    text: int
    """Number of text keys in each part of the keys."""
    text_start: int
    """The first text key."""
    softmax_scale: float
    fold: int

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, lse: Tensor, video: VideoTokens, softmax_scale: float, fold: int
    ) -> Call:
        """Make a call for a layout."""
        layout = (video.frames, video.positions, video.vision_slice.start, video.text, video.text_slice.start)
        return cls(query, key, lse, *layout, softmax_scale, fold)

    @property
    def vision(self) -> int:
        """Number of video tokens."""
        return self.frames * self.positions

    @property
    def own(self) -> int:
        """Number of keys of one part."""
        return self.key.shape[2] // self.fold
