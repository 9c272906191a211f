"""Pool a teacher's attention over layers and steps, per head, while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mekernels import MotionScores, MotionStatistics, VideoTokens, attention_rows, motion_scores

from .prior_settings import PriorSettings


class AttentionPool:
    """An `AttentionReader` that keeps the data of a prior: MotionStatistics, and cross-attention rows if any.

    Args:
        layout: positions of text and vision in the self-attention.
        heads: number of heads of the self-attention.
        tokens: number of real tokens of the prompt.
        settings: say which rows are sampled and how the steps are weighted.
        rows: positions of the real tokens in the text; by default the first ones.
    """

    def __init__(
        self,
        layout: VideoTokens,
        heads: int,
        tokens: int,
        settings: PriorSettings,
        device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.layout, self.settings = layout, settings
        self._rows = torch.tensor(range(tokens) if rows is None else rows, dtype=torch.long)
        self._joint = layout.text > 0
        self._new_sums = partial(
            MotionStatistics,
            layout,
            heads,
            text_rows=layout.text_slice.start + self._rows if self._joint else self._rows[:0],
            sampled_rows=settings.sampled_rows,
            device=device,
            diagonal_width=settings.diagonal_width,
        )
        self._statistics = self._new_sums()
        self._by_head = settings.head_selection == "cross"
        self._words: torch.Tensor | None = None
        self._word_updates = 0
        self._level: int | None = None
        self._weighted: dict[str, torch.Tensor] = {}
        self._layers = 0

    # ---- reading ----

    def at_level(self, level: int) -> AttentionPool | None:
        """The reader of a noise level, where 1 is the cleanest; None if the level has no weight."""
        weights = self.settings.step_weights
        if weights is None:
            return self
        self._close_level()
        self._level = level
        return self if self._weight(level) > 0 else None

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, fold: int) -> None:
        if not self._by_head:
            self._statistics.update(query, key, lse, fold=fold)

    def cross_attention(self, text: torch.Tensor, vision: torch.Tensor) -> None:
        rows = self._rows.to(text.device)[None]
        reduce = "none" if self._by_head else "mean"
        read = attention_rows(text, vision, rows, slice(0, self.layout.vision), reduce=reduce)[0]
        self._words = read if self._words is None else self._words + read
        self._word_updates += 1

    # ---- what was read ----

    def scores(self) -> MotionScores:
        """Motion scores of the heads, by which heads are selected."""
        self._finish()
        if self._by_head:
            return word_scores(self._mean_words(), self.layout)
        return self._statistics.scores()

    def text_attention(self, heads: torch.Tensor) -> torch.Tensor:
        """(T, S): each word's row, averaged over the chosen heads, or over all heads without selection."""
        self._finish()
        if self._joint:
            return self._statistics.text_attention(heads)
        words = self._mean_words()
        return words[heads].mean(0) if self._by_head else words

    def _mean_words(self) -> torch.Tensor:
        if self._words is None:
            raise ValueError("no cross-attention was read")
        return self._words / self._word_updates

    # ---- weighted steps: each level's sums are scaled and added once the next level begins ----

    def _weight(self, level: int) -> float:
        weights = self.settings.step_weights
        assert weights is not None
        return weights[self.settings.steps - level] / sum(weights)

    def _close_level(self) -> None:
        if self._level is None or not (self._statistics.updates or self._word_updates):
            return
        weight = self._weight(self._level)
        state = dict(self._statistics.state_dict())
        self._layers = int(state.pop("updates"))
        if self._words is not None:
            state["words"] = self._words / self._word_updates
        for name, value in state.items():
            scaled = value * weight
            self._weighted[name] = self._weighted[name] + scaled if name in self._weighted else scaled
        self._statistics = self._new_sums()
        self._words, self._word_updates = None, 0

    def _finish(self) -> None:
        self._close_level()
        if not self._weighted:
            return
        self._words = self._weighted.pop("words", None)
        self._word_updates = 1
        self._statistics.load_state_dict({**self._weighted, "updates": torch.tensor(self._layers)})
        self._weighted, self._level = {}, None


def word_scores(words: torch.Tensor, layout: VideoTokens) -> MotionScores:
    """Motion scores of the heads of a cross-attention, from the places of their words over time.

    The map of a self-attention is replaced by a map between places: its entry is the product of a word's
    masses at the two places, averaged over words. This map is not built. Its diagonals are F × F products at
    each position, and its squares follow from the products of the words with each other.

    Args:
        words: (heads, T, S) rows of text tokens over vision, each summing to one.
        layout: of the S vision tokens.
    """
    diagonal, mean, squares = [], [], []
    for head in words.double():
        count = len(head)
        places = head.unflatten(1, (layout.frames, -1))
        diagonal.append(torch.einsum("tfp,tgp->fgp", places, places) / count)
        mean.append(head.sum(1).square().sum() / count / layout.vision**2)
        squares.append((head @ head.T).square().sum() / count**2)
    return motion_scores(torch.stack(diagonal), torch.stack(mean), torch.stack(squares))
