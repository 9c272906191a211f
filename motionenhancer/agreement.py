"""Compare single-evaluation priors with the full procedure, or two teachers, on your own clips.

`python -m motionenhancer.agreement --teacher DIR --data FILE --video_root DIR --noise_levels 100,200,400`
compares with the paper's full procedure. `--teacher DIR OTHER` compares two teachers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from .data import SkipLog
from .data.readers import load_samples
from .files import write_json
from .flags import parse_arguments
from .priors.arguments import PriorArguments
from .priors.combination import compare_words
from .priors.comparison import mean_agreement, read_in_ways
from .priors.maker import DeadTeacher, LocalMaker, count_failed, make_all
from .priors.prior_settings import PriorSettings
from .priors.requests import Made, request_priors
from .processes import join_processes
from .settings import AgreementArguments, DataArguments
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
        One row for each noise level: mean agreement, evaluations, share of the full procedure's time.

    Raises:
        ValueError: the teacher does not have a noise level; no clip could be read.
    """
    assert data.data is not None
    if prior.source is not None:
        raise ValueError(f"--teacher {prior.teacher} has no noise levels: give a video model")
    full = replace(settings, mode="reconstruct")
    ways = [full, *(replace(full, mode="renoise", noise_level=level) for level in levels)]
    for way in ways:
        prior.check(way, PartialState().device)
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


def compare(
    data: DataArguments, prior: PriorArguments, settings: PriorSettings, skips: SkipLog
) -> list[dict[str, Any]]:
    """Measure how far the priors of the first teacher agree with each other teacher's. Priors are not stored.

    Returns:
        One row for each other teacher: the teacher, `clips`, and the means of the results of `compare_words`.

    Raises:
        ValueError: no clip could be read by both teachers.
    """
    assert data.data is not None
    device = PartialState().device
    prior.check(settings, device)
    samples = load_samples(data.data, data.video_root, data.limit, skips)
    read = []
    for one in prior.each():
        found = {}
        with closing(LocalMaker(partial(one.load, device), one.reading(settings))) as maker:
            pairs = tqdm(list(one.requests(samples, skips)), desc="agreement", unit="clip")
            for sample, _, made in make_all(pairs, maker):
                if isinstance(made, Made):
                    found[sample.id] = made.prior
                else:
                    count_failed(sample, made, skips)
        read.append(found)
    rows = []
    for teacher, others in zip(prior.teachers[1:], read[1:], strict=True):
        both = [compare_words(mine, others[id]) for id, mine in read[0].items() if id in others]
        if not both:
            raise ValueError(f"{prior.teachers[0]} and {teacher} read no clip in common. {skips.summary()}")
        rows.append({"teacher": teacher, **mean_agreement(both)})
    return rows


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
        prior.find()
        use_toy_defaults(data, prior)
        several = len(prior.teachers) > 1
        if several and own.noise_levels != AgreementArguments.noise_levels:
            raise ValueError("--noise_levels does nothing with several teachers; leave it out")
        levels = _levels(own.noise_levels)
        data.limit = data.limit or 8
        rows: list[dict[str, Any]] = (
            compare(data, prior, settings, skips)
            if several
            else [*measure(data, prior, settings, levels, skips)]
        )
    except (ValueError, OSError, DeadTeacher) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print_teachers(prior.teachers[0], rows) if several else _print_levels(rows)
    if skips.total:
        print(skips.summary())
    if own.report:
        write_json(own.report, rows)
    return 0


def _print_teachers(first: str, rows: list[dict[str, Any]]) -> None:
    print(f"Agreement with the priors of {first}, on its grid")
    print("words: share of the first teacher's words that this one keeps too; cosine: mean over their rows")
    print("words  cosine  clips  teacher")
    for row in rows:
        print(f"{row['words']:5.2f}  {row['cosine']:6.3f}  {row['clips']:5.0f}  {row['teacher']}")


def _print_levels(rows: list[dict[str, Any]]) -> None:
    print(f"Agreement of one evaluation with the full procedure, mean over {rows[0]['clips']} clips")
    print("level  head rank  heads  tokens  cosine  evaluations  time")
    for row in rows:
        print(
            f"{row['noise_level']:5d}  {row['head_rank']:9.3f}  {row['heads']:5.2f}  {row['tokens']:6.2f}  "
            f"{row['cosine']:6.3f}  {row['evaluations']:4.0f} of {row['full_evaluations']:3.0f}  "
            f"{row['time_share']:5.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())
