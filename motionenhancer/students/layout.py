"""The meaning of a sample's tokens: characters of its text, and places of its videos."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class VisionLayout:
    """Positions of one video's tokens among a sample's tokens.

    positions: (F * H * W,) int64 token positions in raster order t, h, w; -1 for a place without a token.
    grid: (F, H, W) after spatial and temporal merging.
    """

    positions: torch.Tensor
    grid: tuple[int, int, int]

    @classmethod
    def placed(cls, tokens: torch.Tensor, grid: tuple[int, int, int], places: torch.Tensor) -> VisionLayout:
        """The layout of tokens at these positions and places (-1 for none), both (tokens,) int64."""
        positions = torch.full((math.prod(grid),), -1)
        positions[places[places >= 0]] = tokens[places >= 0]
        return cls(positions, grid)

    @property
    def columns(self) -> slice | torch.Tensor:
        """A slice if the tokens are contiguous and every place has a token; otherwise their positions."""
        first, count = int(self.positions[0]), len(self.positions)
        contiguous = first >= 0 and torch.equal(self.positions, torch.arange(first, first + count))
        return slice(first, first + count) if contiguous else self.positions

    @property
    def first(self) -> int:
        """Position of the video's first token: no earlier row can see the video."""
        return int(self.positions[self.positions >= 0].min())

    def shifted(self, count: int) -> VisionLayout:
        """The same tokens after ``count`` more tokens."""
        return replace(self, positions=torch.where(self.positions < 0, -1, self.positions + count))


@dataclass(frozen=True)
class TokenLayout:
    """The characters and video places of a sample's tokens.

    text: the conversation rendered by the chat template, with expanded placeholders.
    offsets: (N, 2) int64 character range of each token in ``text``; empty for a token without characters.
    message_spans: for each message the (start, end) in ``text`` of its non-blank text parts.
    videos: one layout for each video, in order of appearance.
    start: number of padding tokens before the first token. Positions in ``videos`` include them; the rows of
        ``offsets`` do not: token i is at position start + i.
    """

    text: str
    offsets: torch.Tensor
    message_spans: tuple[tuple[tuple[int, int], ...], ...]
    videos: tuple[VisionLayout, ...] = ()
    start: int = 0

    def shifted(self, count: int) -> TokenLayout:
        """The same tokens after ``count`` more padding tokens."""
        videos = tuple(video.shifted(count) for video in self.videos)
        return replace(self, videos=videos, start=self.start + count)


@dataclass(frozen=True)
class Encoded:
    """One sample as tensors, not padded.

    input_ids, attention_mask, labels: (N,) int64; labels are -100 except on learnt answers of the assistant
        and the token that ends each answer.
    token_inputs: other (N,) int64 model inputs, padded with 0 (e.g. ``mm_token_type_ids``).
    vision_inputs: model inputs whose first dimension counts patches or videos; batches concatenate them.
    layout: characters and vision tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    layout: TokenLayout
    token_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    vision_inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = (self.input_ids, self.attention_mask, self.labels)
        return sum(t.nbytes for t in (*own, *self.token_inputs.values(), *self.vision_inputs.values()))
