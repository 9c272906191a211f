"""Combine the priors of several teachers, which are stored separately, when they are used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import torch

from mekernels import VideoTokens, resample_rows, token_motion_scores

from ..data.sample import whole_words
from ..data.video import VideoError
from .confidence import prior_confidence
from .maker import PriorMaker, RefusedClip, refusal_of, when_all
from .prior import MotionPrior, PriorError
from .reader import Grid
from .requests import Made, PriorRequest
from .storage import PriorStore

Weights = tuple[float, ...] | None
"""One weight for each teacher; None: the weight of each prior is its confidence."""
Span = tuple[int, int]


def word_rows(prior: MotionPrior, grid: Grid) -> dict[Span, torch.Tensor]:
    """Convert a prior to whole words and another grid.

    Returns:
        Character range of each word with a kept token → (S,) float32, the mean of the rows of its tokens.
        Each of these rows is first scaled to sum to one.
    """
    rows = resample_rows(prior.attention.float()[None], prior.grid, grid)[0]
    found = {}
    for start, end in whole_words(prior.prompt):
        inside = [i for i, (a, b) in enumerate(prior.spans) if max(a, start) < min(b, end)]
        if inside:
            found[start, end] = rows[inside].mean(dim=0)
    return found


def combine_priors(
    priors: Sequence[MotionPrior | None], weights: Weights, grid: Grid | None = None
) -> MotionPrior:
    """Combine the priors of several teachers for one clip and text.

    A word is kept if any teacher kept it. Its row is the weighted mean of the rows of the teachers that kept
    it.

    Args:
        priors: one for each teacher; None for a teacher without a prior.
        weights: see `Weights`. If all confidences are 0, the weights are equal.
        grid: (F, H, W) of the result; by default the grid of the first prior.

    Returns:
        One prior of whole words. A single prior that already has the grid is returned unchanged.

    Raises:
        ValueError: there is no prior, or the priors belong to different texts.
    """
    given = zip(priors, weights or (None,) * len(priors), strict=True)
    used = [
        (prior, prior.confidence["confidence"] if weight is None else weight)
        for prior, weight in given
        if prior is not None
    ]
    if not used:
        raise ValueError("priors must hold at least one, got none")
    first = used[0][0]
    grid = grid or first.grid
    if len(used) == 1 and first.grid == grid:
        return first
    if any(prior.prompt != first.prompt for prior, _ in used):
        raise ValueError("priors must have the same prompt to be combined")
    rows: dict[Span, list[tuple[float, torch.Tensor]]] = {}
    for prior, weight in used:
        for span, row in word_rows(prior, grid).items():
            rows.setdefault(span, []).append((weight, row))
    spans = sorted(rows)
    attention = torch.stack([_mean(rows[span]) for span in spans]).half()
    words = [first.prompt[slice(*span)] for span in spans]
    return replace(
        first,
        attention=attention,
        tokens=words,
        spans=spans,
        grid=grid,
        heads=[],
        head_scores={},
        all_tokens=words,
        all_spans=spans,
        token_scores=token_motion_scores(attention.float(), VideoTokens(*grid)).tolist(),
        kept=list(range(len(spans))),
        confidence=prior_confidence(attention, grid),
        teacher="+".join(prior.teacher for prior, _ in used),
        truncated=min(prior.truncated for prior, _ in used),
        cut_words=min(prior.cut_words for prior, _ in used),
        unknown=min(prior.unknown for prior, _ in used),
        evaluations=sum(prior.evaluations for prior, _ in used),
        seconds={},
        times=first.times if first.grid == grid else [],
    )


def _mean(weighed: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """The weighted mean of rows; equal weights if all weights are 0."""
    weights = torch.tensor([weight for weight, _ in weighed])
    shares = weights / weights.sum() if weights.any() else torch.full_like(weights, 1 / len(weighed))
    return (shares[:, None] * torch.stack([row for _, row in weighed])).sum(dim=0)


def compare_words(one: MotionPrior, other: MotionPrior) -> dict[str, float]:
    """Agreement of two teachers' priors of one clip and text, on the grid of the first prior.

    Returns:
        words: share of the first prior's words that the second prior kept too.
        cosine: mean cosine of the rows of words that both priors kept; NaN if there are none.
    """
    mine, theirs = word_rows(one, one.grid), word_rows(other, one.grid)
    shared = [span for span in mine if span in theirs]
    pairs = [torch.cosine_similarity(mine[span].double(), theirs[span].double(), dim=0) for span in shared]
    cosine = float(torch.stack(pairs).mean()) if pairs else float("nan")
    return {"words": len(shared) / len(mine), "cosine": cosine}


@dataclass(frozen=True)
class CombinedStore(PriorStore):
    """A store whose keys join the keys of several teachers' priors with `+`.

    Attributes:
        weights, grid: see `combine_priors`.
    """

    weights: Weights = None
    grid: Grid | None = None

    def read(self, key: str) -> MotionPrior:
        """Load and combine priors. The key of a teacher without a prior is empty. See `PriorStore.read`."""
        read = super().read
        return combine_priors([read(one) if one else None for one in key.split("+")], self.weights, self.grid)


class Combined:
    """Submits the parts of a request to several makers and combines their priors; see `PriorMaker`.

    If some teachers cannot read a clip, the priors of the others are used.

    Args:
        makers: one for each teacher; `close` closes them.
        weights, grid: see `combine_priors`.
    """

    def __init__(self, makers: Sequence[PriorMaker], weights: Weights, grid: Grid | None) -> None:
        self.makers, self.weights, self.grid = makers, weights, grid
        self.capacity = min(maker.capacity for maker in makers)

    def submit(self, request: PriorRequest) -> Future[Made]:
        """See `PriorMaker`. The request has one part for each maker."""
        parts = zip(self.makers, request.parts, strict=True)
        asked = [None if part is None else maker.submit(part) for maker, part in parts]
        waiting = [one for one in asked if one is not None]

        def given_up(done: Future[Made]) -> None:
            if done.cancelled():
                for one in waiting:
                    one.cancel()

        answer = when_all(waiting, partial(self._combine, asked))
        answer.add_done_callback(given_up)
        return answer

    def close(self) -> None:
        for maker in self.makers:
            maker.close()

    def _combine(self, asked: Sequence[Future[Made] | None]) -> Made:
        made: list[Made | None] = []
        errors: list[VideoError | PriorError | RefusedClip] = []
        for answer in asked:
            try:
                made.append(None if answer is None else answer.result())
            except (VideoError, PriorError, RefusedClip) as error:
                made.append(None)
                errors.append(error)
        there = [one for one in made if one is not None]
        if not there:
            raise errors[0]
        refused = [refusal_of(error) for error in errors]
        left_out = [(f"{one.reason}; the other teachers' priors are used", one.detail) for one in refused]
        return Made(
            combine_priors([None if one is None else one.prior for one in made], self.weights, self.grid),
            fresh=any(one.fresh for one in there),
            seconds=sum(one.seconds for one in there),
            damaged=next((one.damaged for one in there if one.damaged), ""),
            lost=next((one.lost for one in there if one.lost), ""),
            left_out=(*left_out, *(entry for one in there for entry in one.left_out)),
            roundtrip=next((one.roundtrip for one in there if one.roundtrip), None),
        )
