"""How far priors read in one evaluation agree with the paper's full procedure, on the user's own clips.

`python -m motionenhancer.agreement --teacher DIR --data FILE --video_root DIR --noise_levels 100,200,400`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from .arguments import DataArguments, PriorArguments, parse_arguments
from .data import SkipLog
from .data.video import VideoError
from .extract import load_samples, use_toy_defaults
from .extraction.making import decode
from .extraction.planning import request_priors
from .prior import MotionPrior, PriorError, extract_prior
from .processes import join_processes


@dataclass
class AgreementArguments:
    """What is compared."""

    noise_levels: str = field(
        default="50,100,200,400,600,800", metadata={"help": "Training timesteps of the single evaluations."}
    )
    report: str | None = field(default=None, metadata={"help": "Also write the table as json to this file."})


def compare_priors(one: MotionPrior, other: MotionPrior) -> dict[str, float]:
    """Agreement of two priors of the same clip and text.

    Args:
        one, other: priors on one grid.

    Returns:
        head_rank: Spearman's rank correlation of the composite head scores.
        heads, tokens: shares of the first prior's chosen heads and kept tokens that the second chose too.
        cosine: mean cosine of the rows of tokens that both kept, NaN if there are none.

    Raises:
        ValueError: priors of different prompts or grids.
    """
    if one.prompt != other.prompt or one.grid != other.grid:
        raise ValueError("priors must be of one prompt and one grid to be compared")
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
    """Rank correlation, ties sharing their mean rank; NaN where one side is constant."""
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other)]
    centred = [r - r.mean() for r in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal - 1) / 2


def measure(
    data: DataArguments, prior: PriorArguments, levels: Sequence[int], skips: SkipLog
) -> list[dict[str, float]]:
    """One row a noise level: mean agreement with the full procedure, evaluations and seconds of a clip.

    Args:
        data, prior: the clips, and the teacher and how it is read.
        levels: training timesteps of the single evaluations.
        skips: receives samples that cannot be compared and why.

    Raises:
        ValueError: a level that the teacher does not have; no clip could be read.
    """
    use_toy_defaults(data, prior)
    settings = replace(prior.settings(), mode="reconstruct")
    requests = request_priors(load_samples(data, skips), settings, prior.prompt_source, skips)
    if not requests:
        raise ValueError(f"no sample has a text and one video that is there. {skips.summary()}")
    teacher = prior.load(PartialState().device)
    full: list[MotionPrior] = []
    single: dict[int, list[MotionPrior]] = {level: [] for level in levels}
    for request in tqdm(requests, desc="agreement", unit="clip"):
        sample, text = request.sample, request.text
        try:
            frames = decode(request, teacher)
            made = extract_prior(teacher, frames, text, **asdict(settings))
            quick = [
                extract_prior(
                    teacher, frames, text, **asdict(replace(settings, mode="renoise", noise_level=n))
                )
                for n in levels
            ]
        except (VideoError, PriorError) as error:
            skips.add("unreadable", id=sample.id, line=sample.line, detail=str(error))
            continue
        full.append(made)
        for level, one in zip(levels, quick, strict=True):
            single[level].append(one)
    if not full:
        raise ValueError(f"no clip could be read. {skips.summary()}")
    cost = average([sum(p.seconds.values()) for p in full])
    rows = []
    for level in levels:
        each = [compare_priors(a, b) for a, b in zip(full, single[level], strict=True)]
        rows.append(
            {
                "noise_level": level,
                **{name: average([e[name] for e in each]) for name in each[0]},
                "evaluations": average([p.evaluations for p in single[level]]),
                "time_share": average([sum(p.seconds.values()) for p in single[level]]) / cost,
                "full_evaluations": average([p.evaluations for p in full]),
                "clips": len(full),
            }
        )
    return rows


def _levels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--noise_levels must be whole numbers between commas, got {text!r}") from None


def average(values: Sequence[float]) -> float:
    finite = [v for v in values if v == v]
    return sum(finite) / len(finite) if finite else float("nan")


def main(argv: list[str] | None = None) -> int:
    own, data, prior = parse_arguments(
        (AgreementArguments, DataArguments, PriorArguments), argv, prog="python -m motionenhancer.agreement"
    )
    skips = SkipLog()
    try:
        join_processes()
        levels = _levels(own.noise_levels)
        data.limit = data.limit or 8
        rows = measure(data, prior, levels, skips)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Agreement of one evaluation with the full procedure, mean over {rows[0]['clips']} clips")
    print("level  head rank  heads  tokens  cosine  evaluations  time")
    for row in rows:
        print(
            f"{row['noise_level']:5d}  {row['head_rank']:9.3f}  {row['heads']:5.2f}  {row['tokens']:6.2f}  "
            f"{row['cosine']:6.3f}  {row['evaluations']:4.0f} of {row['full_evaluations']:3.0f}  "
            f"{row['time_share']:5.1%}"
        )
    if skips.total:
        print(skips.summary())
    if own.report:
        Path(own.report).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
