"""The data that a teacher and its readers exchange."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Protocol

import torch

from mekernels import VideoTokens


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
        rows: place of each real token among the text tokens of the attention; None: they come first.
        attended: text tokens that are attended to, where padding is masked; None: all, padding included.
    """

    embeds: torch.Tensor
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    text: str
    words: tuple[int, ...]
    truncated: int = 0
    rows: tuple[int, ...] | None = None
    attended: int | None = None

    @property
    def unknown(self) -> int:
        """Number of letters, digits, signs and marks of the text, up to its cut, that are in no word.

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
        picture: latents of the first frame, for a model that starts from one; see `Teacher.showing`.
        stride: video frames that each frame of the grid stands for, the first aside.
    """

    latents: torch.Tensor
    tokens: VideoTokens
    frames_given: int
    frames_used: int
    picture: torch.Tensor | None = None
    stride: int = 4
