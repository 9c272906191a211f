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
        """Take one layer's self-attention of vision tokens; in joint models, also of text tokens.

        query (1, heads, tokens, width), key (1, heads, fold · tokens, width), lse (1, heads, tokens), natural
        logarithm. Reference keys, if any, follow the own keys.
        """

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        """Take one layer's cross-attention from vision tokens to the text.

        text (1, heads, length, width): the keys, including padding. vision (1, heads, S, width): the queries.
        """


@dataclass(frozen=True)
class TextEncoding:
    """A prompt as the teacher reads it.

    Attributes:
        embeds: (1, length, width) hidden states of the text encoder, including padding.
        tokens: the surface text of each real token (not padding, not the end token).
        spans: character range of each real token in `text`.
        text: the prompt.
        words: indices of the real tokens that are neither a bare space nor an unknown piece.
        truncated: number of real tokens that were cut.
        rows: position of each real token among the text tokens of the attention; None: they come first.
        attended: number of attended text tokens, if padding is masked; None: all, including padding.
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
    def read(self) -> int:
        """Number of characters of the text up to its cut."""
        return max((end for _, end in self.spans), default=0) if self.truncated else len(self.text)

    @property
    def unknown(self) -> int:
        """Number of letters, digits, signs and marks of the text, up to its cut, that no word contains.

        They belong to unknown pieces, or the tokenizer dropped them.
        """
        known = {i for word in self.words for i in range(*self.spans[word])}
        categories = (unicodedata.category(c)[0] for c in self.text[: self.read])
        return sum(kind in "LNPS" and i not in known for i, kind in enumerate(categories))


@dataclass(frozen=True)
class VideoLatents:
    """A clip in the teacher's latent space, and how it was encoded.

    Attributes:
        latents: (1, ...) float32, in the scale of the transformer; frames and channels in the order of the
            family.
        tokens: positions of text and vision in the self-attention; `text` is 0 if it has only vision.
        frames_given: number of given video frames.
        frames_used: number of encoded video frames, after resampling to a count that the family takes.
        picture: latents of the first frame, for an image-to-video model; see `Teacher.showing`.
        stride: number of video frames that each frame of the grid covers, except the first.
    """

    latents: torch.Tensor
    tokens: VideoTokens
    frames_given: int
    frames_used: int
    picture: torch.Tensor | None = None
    stride: int = 4
