"""What a teacher must be able to do; one file a model family implements it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mekernels import VideoTokens

from .schedule import Schedule

#: Called once a layer of every read evaluation: (query, key, lse, fold), shapes (1, heads, tokens, width) and
#: (1, heads, tokens); the key axis is `fold` times as long as the query axis.
AttentionReader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


@dataclass(frozen=True)
class TextEncoding:
    """A prompt as the teacher reads it.

    Attributes:
        embeds: (1, length, width) hidden states of the text encoder, padding included.
        tokens: the surface text of each real token (no padding, no end token).
        spans: character range of each real token in `text`.
        text: the prompt.
        truncated: how many real tokens did not fit and were cut off.
    """

    embeds: torch.Tensor
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    text: str
    truncated: int = 0


@dataclass(frozen=True)
class VideoLatents:
    """A clip in the teacher's latent space, with what was done to get it there.

    Attributes:
        latents: (1, frames, channels, height, width) float32, already multiplied by the scaling factor.
        tokens: where the transformer keeps text and vision.
        frames_given: video frames received.
        frames_used: video frames encoded, after resampling to a count the family accepts.
        size: (height, width) in pixels the frames were resized to.
    """

    latents: torch.Tensor
    tokens: VideoTokens
    frames_given: int
    frames_used: int
    size: tuple[int, int]


class Teacher(Protocol):
    """A frozen video diffusion transformer whose text-to-vision attention can be read."""

    id: str
    family: str
    device: torch.device
    dtype: torch.dtype

    @property
    def heads(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def max_frames(self) -> int:
        """Most video frames it reads of one clip; longer clips are thinned to it."""
        ...

    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        """uint8 frames (n, h, w, 3) → latents; n and the size are brought to what the family accepts."""
        ...

    def encode_text(self, text: str) -> TextEncoding: ...

    def schedule(self, steps: int) -> Schedule:
        """The deterministic schedule of `steps` levels, with the forward scheduler's own noise levels."""
        ...

    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: int) -> torch.Tensor:
        """One transformer evaluation; latents (b, f, c, h, w), embeds (b, length, width); float32 out."""
        ...

    def reading(
        self, reader: AttentionReader | None, *, memory: bool, row: int
    ) -> AbstractContextManager[None]:
        """While open, evaluations hand `reader` the attention of batch row `row`.

        With `memory` the second half of the batch is the reference stream: row i of the first half attends to
        its own keys and to those of row i of the second half, side by side.
        """
        ...
