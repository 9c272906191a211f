"""Compare priors of one evaluation with those of the paper's full procedure, on the user's own clips.

`python -m motionenhancer.agreement --teacher DIR --data FILE --video_root DIR --noise_levels 100,200,400`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from accelerate import PartialState
from tqdm import tqdm

from .data import SkipLog
from .data.readers import load_samples
from .files import write_json
from .flags import parse_arguments
from .priors.comparison import mean_agreement, read_in_ways
from .priors.maker import DeadTeacher, LocalMaker
from .priors.prior import PriorSettings, check_settings
from .priors.requests import request_priors
from .processes import join_processes
from .settings import AgreementArguments, DataArguments, PriorArguments
from .toy.defaults import use_toy_defaults


def measure(
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    levels: Sequence[int],
    skips: SkipLog,
) -> list[dict[str, float]]:
    """Measure how far single evaluations at `levels` agree with the full procedure.

    Returns:
        One row a noise level: mean agreement, evaluations and share of the time of a clip.

    Raises:
        ValueError: a level that the teacher does not have; no clip could be read.
    """
    prior.find()
    use_toy_defaults(data, prior)
    assert data.data is not None
    assert prior.teacher is not None
    full = replace(settings, mode="reconstruct")
    ways = [full, *(replace(full, mode="renoise", noise_level=level) for level in levels)]
    for way in ways:
        check_settings(way, prior.teacher)
    samples = load_samples(data.data, data.video_root, data.limit, skips)
    pairs = list(request_priors(samples, prior.prompt_source, skips))
    if not pairs:
        raise ValueError(f"no sample has a text and exactly one video that exists. {skips.summary()}")
    found = []
    with closing(LocalMaker(partial(prior.load, PartialState().device), full)) as maker:
        for pair in tqdm(pairs, desc="agreement", unit="clip"):
            found += read_in_ways(maker, [pair], ways, skips, "unreadable")
    if not found:
        raise ValueError(f"no clip could be read. {skips.summary()}")
    columns = zip(levels, zip(*found, strict=True), strict=True)
    return [{"noise_level": level, **mean_agreement(rows)} for level, rows in columns]


def _levels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--noise_levels must be whole numbers separated by commas, got {text!r}") from None


def main(argv: list[str] | None = None) -> int:
    own, data, prior, settings = parse_arguments(
        (AgreementArguments, DataArguments, PriorArguments, PriorSettings),
        argv,
        prog="python -m motionenhancer.agreement",
    )
    skips = SkipLog()
    try:
        join_processes()
        levels = _levels(own.noise_levels)
        data.limit = data.limit or 8
        rows = measure(data, prior, settings, levels, skips)
    except (ValueError, OSError, DeadTeacher) as error:
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
        write_json(own.report, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
