"""Maps that replace the teacher's in the study; each removes a property of priors, to measure its effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import mekernels
from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.priors.prior import MotionPrior
from motionenhancer.students import capture_attention
from motionenhancer.toy.scene import TASKS

__all__ = ["CONTROLS", "own_priors"]

Priors = Sequence[MotionPrior]


def _another_clip(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    """Rows of another clip of the same task: the n-th kept word gets the n-th row of the other clip."""
    rows = [prior.attention for prior in priors]
    for task in range(len(TASKS)):
        same = list(range(task, len(priors), len(TASKS)))
        order = [same[int(i)] for i in torch.randperm(len(same), generator=generator)]
        for mine, other in zip(order, [*order[1:], *order[:1]], strict=True):
            theirs = priors[other].attention
            rows[mine] = theirs[torch.arange(len(priors[mine].attention)) % len(theirs)]
    return rows


def _another_word(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    """Each kept word gets the row of another kept word of the clip, at one distance in words for all."""
    found = []
    for prior in priors:
        count = len(prior.attention)
        away = 0 if count < 2 else int(torch.randint(1, count, (1,), generator=generator))
        found.append(prior.attention.roll(away, 0))
    return found


def _mean(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    """All words of all clips have one map, the mean of all rows, each scaled to sum to one."""
    rows = torch.cat([prior.attention for prior in priors]).float()
    mean = (rows / rows.sum(-1, keepdim=True)).mean(0)
    return [mean.expand(len(prior.attention), -1).to(prior.attention.dtype) for prior in priors]


def _uniform(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.ones_like(prior.attention) for prior in priors]


def _reversed(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    return [prior.attention.unflatten(-1, prior.grid).flip(1).flatten(1) for prior in priors]


def _shuffled(priors: Priors, generator: torch.Generator) -> list[torch.Tensor]:
    """A clip's frames get another order, the same for all of its words."""
    return [
        prior.attention.unflatten(-1, prior.grid)[
            :, torch.randperm(prior.grid[0], generator=generator)
        ].flatten(1)
        for prior in priors
    ]


#: Name of a control → function that makes maps for all clips from all priors and a random generator.
CONTROLS: dict[str, Callable[[Priors, torch.Generator], list[torch.Tensor]]] = {
    "another clip's": _another_clip,
    "another word's": _another_word,
    "mean of all clips": _mean,
    "uniform": _uniform,
    "frames reversed": _reversed,
    "frames shuffled": _shuffled,
}


@torch.no_grad()
def own_priors(model: Any, processor: Any, family: Any, items: Sequence[Item]) -> list[MotionPrior]:
    """The student's own maps in place of each item's prior: same words, same grid, no teacher.

    Args:
        model, processor, family: of `motionenhancer.students.load_student`.
        items: each with a prior, whose words are kept.
    """
    collate, found = MotionCollator(family, processor), []
    for start in range(0, len(items), 50):
        part = items[start : start + 50]
        batch = collate(part)
        asked = batch.pop("alignment")
        for name in ("ids", "skipped", "labels"):
            batch.pop(name)
        with capture_attention(model, asked.rows, asked.columns) as captured:
            model(**batch)
        for item, rows, tokens, grid in zip(
            part, captured.attention, asked.row_tokens, asked.grids, strict=True
        ):
            assert item.prior is not None
            words = range(len(item.prior.attention))
            # A word that the student does not have is not aligned: its row is never read.
            each = [rows[tokens == w].mean(0) if bool((tokens == w).any()) else rows[0] for w in words]
            maps = torch.stack(each)[None, :, : grid[0] * grid[1] * grid[2]]
            own = mekernels.resample_rows(maps, grid, item.prior.grid, normalize=True)[0]
            found.append(replace(item.prior, attention=own.half()))
    return found
