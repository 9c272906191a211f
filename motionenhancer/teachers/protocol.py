"""What a teacher must be able to do; one file a model family implements it."""

from __future__ import annotations

import unicodedata
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mekernels import VideoTokens

from .schedule import Schedule


class AttentionReader(Protocol):
    """Receives the attention of one batch row, layer by layer, while a teacher's `reading` is open."""

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        """One layer's attention among vision tokens, and in joint models text tokens.

        query (1, heads, tokens, width), key (1, heads, fold · tokens, width), lse (1, heads, tokens), natural
        logarithm. Reference keys, if any, follow the own keys.
        """
        ...

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        """One layer's cross-attention of a model whose vision tokens look at the text.

        text (1, heads, length, width), the keys of the text, padding included; vision (1, heads, S, width),
        the queries.
        """
        ...


@dataclass(frozen=True)
class TextEncoding:
    """A prompt as the teacher reads it.

    Attributes:
        embeds: (1, length, width) hidden states of the text encoder, padding included.
        tokens: the surface text of each real token (no padding, no end token).
        spans: character range of each real token in `text`.
        text: the prompt.
        words: indices of the real tokens that are neither a bare space nor an unknown piece.
        truncated: how many real tokens did not fit and were cut off.
    """

    embeds: torch.Tensor
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    text: str
    words: tuple[int, ...]
    truncated: int = 0

    @property
    def unknown(self) -> int:
        """How many letters, digits, signs and marks of the text, short of where it was cut, are in no word.

        They belong to unknown pieces, or the tokenizer dropped them.
        """
        read = max((end for _, end in self.spans), default=0) if self.truncated else len(self.text)
        known = {i for word in self.words for i in range(*self.spans[word])}
        categories = (unicodedata.category(c)[0] for c in self.text[:read])
        return sum(kind in "LNPS" and i not in known for i, kind in enumerate(categories))


@dataclass(frozen=True)
class VideoLatents:
    """A clip in the teacher's latent space, with what was done to get it there.

    Attributes:
        latents: (1, ...) float32, scaled as the transformer wants them; frames and channels in the family's
            own order.
        tokens: where self-attention keeps text and vision; `text` is 0 where it sees vision only.
        frames_given: video frames received.
        frames_used: video frames encoded, after resampling to a count the family accepts.
        size: (height, width) in pixels the frames were resized to.
        stride: video frames that each frame of the grid stands for, the first aside.
    """

    latents: torch.Tensor
    tokens: VideoTokens
    frames_given: int
    frames_used: int
    size: tuple[int, int]
    stride: int = 4


class Teacher(Protocol):
    """A frozen video diffusion transformer whose text-to-vision attention can be read.

    Attributes:
        id: changes whenever weights, settings or arithmetic do.
        family: name of the model family.
        split_batch: evaluate the prompt's and the empty prompt's rows one after the other, to halve memory.
        boundary: timestep below which a second expert predicts, as `is_low_noise` says; None where one
            transformer serves all noise levels.
    """

    id: str
    family: str
    device: torch.device
    dtype: torch.dtype
    split_batch: bool
    boundary: float | None

    @property
    def heads(self) -> int: ...

    @property
    def layers(self) -> int:
        """Of one evaluation: of one expert, where there are two."""
        ...

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

    def level(self, timestep: int) -> Schedule:
        """A schedule of the one noise level `timestep`."""
        ...

    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        """One transformer evaluation of a batch of latents and (b, length, width) texts; float32 out."""
        ...

    def reading(
        self, reader: AttentionReader | None, *, memory: bool, row: int
    ) -> AbstractContextManager[None]:
        """While open, evaluations hand `reader` the attention of batch row `row`.

        With `memory` the second half of the batch is the reference stream: row i of the first half attends to
        its own keys and to those of row i of the second half, side by side.
        """
        ...
