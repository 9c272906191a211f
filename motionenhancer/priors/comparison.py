"""Measure the agreement of two ways to make a prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data import Clip, Sample, SkipLog
from .maker import DeadTeacher, PriorMaker
from .prior import MotionPrior
from .prior_settings import PriorSettings
from .requests import PriorRequest


def compare_priors(one: MotionPrior, other: MotionPrior) -> dict[str, float]:
    """Agreement of two priors of one clip, text and grid.

    Returns:
        head_rank: Spearman's rank correlation of the composite head scores.
        heads, tokens: shares of the first prior's chosen heads and kept tokens that the second prior has too.
        cosine: mean cosine of the rows of tokens that both priors kept; NaN if there are none.

    Raises:
        ValueError: the priors have different prompts or grids.
    """
    if one.prompt != other.prompt or one.grid != other.grid:
        raise ValueError("priors must have the same prompt and the same grid to be compared")
    shared = [i for i in one.kept if i in other.kept]
    mine, theirs = (p.attention[[p.kept.index(i) for i in shared]].double() for p in (one, other))
    cosine = torch.nn.functional.cosine_similarity(mine, theirs).mean() if shared else float("nan")
    return {
        "head_rank": _spearman(one.head_scores["composite"], other.head_scores["composite"]),
        "heads": len(set(one.heads) & set(other.heads)) / len(one.heads),
        "tokens": len(shared) / len(one.kept),
        "cosine": float(cosine),
    }


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties get their mean rank; NaN if one side is constant."""
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other)]
    centred = [r - r.mean() for r in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal - 1) / 2


def read_in_ways(
    maker: PriorMaker,
    pairs: Sequence[tuple[Sample, PriorRequest]],
    ways: Sequence[PriorSettings],
    skips: SkipLog,
    reason: str,
) -> list[list[dict[str, float]]]:
    """Read clips in several ways and compare the first way with each other way. No prior is stored.

    Clips that cannot be read in every way are counted in `skips` under `reason`.

    Returns:
        One list for each clip that could be read, with an entry for each way except the first: the results of
        `compare_priors`, `time_share`, `evaluations` and `full_evaluations`.

    Raises:
        DeadTeacher: no more priors can be made.
    """
    asked = [[maker.submit(replace(request, settings=settings)) for settings in ways] for _, request in pairs]
    rows = []
    for (sample, _), answers in zip(pairs, asked, strict=True):
        try:
            whole, *others = [answer.result() for answer in answers]
        except DeadTeacher:
            raise
        except Exception as error:
            detail = str(error) or type(error).__name__
            skips.add(reason, id=sample.id, line=sample.line, detail=detail)
            continue
        rows.append(
            [
                {
                    **compare_priors(whole.prior, other.prior),
                    "time_share": other.seconds / whole.seconds,
                    "evaluations": other.prior.evaluations,
                    "full_evaluations": whole.prior.evaluations,
                }
                for other in others
            ]
        )
    return rows


def mean_agreement(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the clips where it is not NaN, and `clips`, the number of clips."""
    means = {}
    for name in rows[0]:
        numbers = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = sum(numbers) / len(numbers) if numbers else float("nan")
    return {**means, "clips": len(rows)}


def measure_agreement(
    maker: PriorMaker,
    pairs: Sequence[tuple[Sample, PriorRequest]],
    settings: PriorSettings,
    clips: int,
    skips: SkipLog,
) -> dict[str, float] | None:
    """Measure how far single-pass priors of a run's first clips agree with the full procedure.

    Each process reads its share of the clips; all get the mean. Unreadable clips are counted in `skips`.

    Returns:
        The result of `mean_agreement`; None if no clip was read.
    """
    state = PartialState()
    distinct: dict[tuple[Path | Clip, str], tuple[Sample, PriorRequest]] = {}
    for sample, request in pairs:
        distinct.setdefault((request.video, request.text), (sample, request))
    mine = list(distinct.values())[:clips][state.process_index :: state.num_processes]
    left_out, ways = SkipLog(), [replace(settings, mode="reconstruct"), settings]
    found = read_in_ways(maker, mine, ways, left_out, "left out of the agreement")
    everyone = gather_object([(found, left_out)])
    skips.merge(log for _, log in everyone)
    rows = [row for part, _ in everyone for (row,) in part]
    return mean_agreement(rows) if rows else None


def say_agreement(found: dict[str, float] | None, settings: PriorSettings) -> str:
    """Return the agreement as one line of text."""
    if found is None:
        return "agreement of single-pass priors: no clip could be read"
    return (
        f"single-pass priors at level {settings.noise_level} against the full procedure, mean over "
        f"{found['clips']:.0f} of the run's clips: head rank {found['head_rank']:.2f}, same heads "
        f"{found['heads']:.0%}, same words {found['tokens']:.0%}, cosine of rows {found['cosine']:.3f}; "
        f"{found['evaluations']:.0f} instead of {found['full_evaluations']:.0f} evaluations, "
        f"{found['time_share']:.0%} of the time"
    )
