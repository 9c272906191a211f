"""Make the motion priors of a whole data file with a teacher, and store them.

`python -m motionenhancer.extract --teacher DIR --data FILE --video_root DIR --prior_dir DIR`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .costs import ExtractionCost, extraction_cost
from .data import Sample, SkipLog
from .data.digests import DigestCache
from .data.readers import read_samples
from .data.sources import open_source
from .files import read_json
from .flags import parse_arguments, parse_options
from .interrupts import on_interrupt
from .priors.arguments import PriorArguments
from .priors.engine import Engine, MakerArguments
from .priors.extraction import EXTRACTION, ExtractionRecord
from .priors.maker import DeadTeacher, Made, Stored, count_failed, count_made, make_all
from .priors.prior import PARTLY_UNKNOWN, say_cut
from .priors.prior_settings import PriorSettings
from .priors.requests import PriorRequest
from .priors.storage import PriorStore
from .processes import from_main, join_processes
from .report.run_report import status_of, versions
from .settings import DataArguments, ExtractArguments
from .toy.defaults import use_toy_defaults

CLASSES = (DataArguments, PriorArguments, PriorSettings, MakerArguments, ExtractArguments)
PROG = "python -m motionenhancer.extract"


def extract(**options: Any) -> dict[str, Any]:
    """Extract priors from Python, like the command.

    Args:
        options: the command's flags, without dashes; `data` may also be a `datasets.Dataset`.

    Returns:
        The content of `extraction.json` in the priors' folder: counts, settings and skipped samples; empty
        for a dry run in a folder without it.

    Raises:
        ValueError, OSError, DeadTeacher: see `run`; a flag that does not exist is named.

    >>> extract(teacher="CogVideoX1.5-5B", data="a.jsonl", prior_dir="priors")["made"]  # doctest: +SKIP
    """
    data, prior, settings, how, command = parse_options(CLASSES, options, prog=PROG)
    run(data, prior, settings, how, dry_run=command.dry_run)
    path = Path(prior.prior_dir) / EXTRACTION
    return read_json(path) if path.is_file() else {}


def main(argv: list[str] | None = None) -> int:
    data, prior, settings, how, command = parse_arguments(CLASSES, argv, prog=PROG)
    try:
        return run(data, prior, settings, how, dry_run=command.dry_run)
    except (ValueError, OSError, DeadTeacher) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    how: MakerArguments,
    *,
    dry_run: bool = False,
) -> int:
    """Do one process's part of an extraction, one teacher after the other; all processes return the same.

    Returns:
        0, or 1 if anything was left out.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong.
        DeadTeacher: no more priors can be made.
    """
    state = join_processes()
    prior.find(dry_run=dry_run)
    use_toy_defaults(data, prior)
    prior.check(settings, state.device)
    assert data.data is not None
    source = open_source(data.data)
    with how.open() as engine:
        record = ExtractionRecord.of(
            prior,
            settings,
            engine.device,
            {**asdict(data), "data": source.name},
            engine=how.prior_engine,
            processes=state.num_processes * engine.teachers,
            versions=versions(),
        )
        teachers, codes = prior.each(), list[int]()
        for place, one in enumerate(teachers):
            if len(teachers) > 1 and state.is_main_process:
                print(f"teacher {one.teacher}")
            if dry_run:
                codes.append(_forecast(data, one, settings, engine))
                continue
            try:
                codes.append(_extract(data, one, settings, how, engine, record, place))
            except BaseException as error:
                if state.is_main_process:
                    said = str(error) or type(error).__name__
                    with suppress(OSError):
                        record.write(place, status_of(error), {"error": said})
                raise
    on_interrupt(lambda: "the extraction had finished")
    return max(codes)


def _extract(
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    how: MakerArguments,
    engine: Engine,
    record: ExtractionRecord,
    place: int,
) -> int:
    """Do one process's part of the extraction from one teacher, the record's at `place`; see `run`."""
    state, began, before = PartialState(), time.time(), record.finished[place]
    assert data.data is not None
    store, skips = PriorStore(Path(prior.prior_dir)), SkipLog()
    # Every process meets the same bad lines: one of them counts them.
    lines = skips if state.is_main_process else SkipLog(shout=0)
    with DigestCache(store.folder) as cache:
        name, settings = prior.name(engine.device, settings), prior.reading(settings)
        requests = prior.requests(
            read_samples(data.data, data.video_root, lines, limit=data.limit),
            skips,
            name=name,
            digest=cache.digest,
            workers=how.prior_workers,
            part=state.process_index,
            parts=state.num_processes,
        )
        if state.is_main_process and before is None:
            record.write(place, "running", {})
        counts = dict.fromkeys(("samples", "stored", "made", "cut_texts", "cut_words"), 0)

        def kept() -> str:
            if state.is_main_process and (before is None or counts["made"]):
                record.write(place, "interrupted", {})
            return f"every finished prior is kept in {store.folder}"

        on_interrupt(kept)
        teacher_id = prior.teacher_id(engine.device)
        maker = engine.maker(prior.absolute().load, teacher_id, settings, roundtrip=prior.measure_roundtrip)
        stored = Stored(store, maker, name, str(prior.teacher), strict=True, retry=True)
        roundtrip = _make(requests, open_source(data.data).file, stored, counts, skips)
        counts["worker_deaths"] = getattr(maker, "deaths", 0)
    everyone = gather_object([(counts, roundtrip, skips)])
    if not state.is_main_process:
        return from_main(0)
    total = SkipLog()
    total.merge(log for *_, log in everyone)
    results = {
        **{what: sum(part[what] for part, *_ in everyone) for what in counts},
        "made_each": [part["made"] for part, *_ in everyone],
        "seconds": round(time.time() - began, 1),
        "roundtrip": next((found for _, found, _ in everyone if found), None),
    }
    found = json.loads(json.dumps({"samples": results["samples"], "skipped": total.to_json()}))
    if before is not None and not results["made"] and found.items() <= before.items():
        print("this extraction is finished; nothing is done")
        record.save()
    else:
        record.write(place, "finished", {**results, **found})
    print(f"{results['samples']} samples have their prior in {store.folder} ({results['made']} made now)")
    if unknown := total.notes[PARTLY_UNKNOWN]:
        print(f"{unknown} priors: {PARTLY_UNKNOWN}; these belong to no word")
    if results["cut_texts"]:
        print(say_cut(results["cut_texts"], results["cut_words"]))
    if results["roundtrip"]:
        print(f"inversion error of the first clip: {results['roundtrip']}")
    if total.total:
        print(total.summary())
        print(f"the whole list: {record.path}")
    return from_main(1 if total.total else 0)


def _make(
    requests: Iterator[tuple[Sample, PriorRequest]],
    data: Path | None,
    stored: Stored,
    counts: dict[str, int],
    skips: SkipLog,
) -> dict[str, float] | None:
    """Make missing priors, with a progress bar over the data file; return the inversion error."""
    roundtrip = None
    size, hidden = 0 if data is None else data.stat().st_size, not PartialState().is_main_process
    # The data file is a stream: the number of its samples is not known, the bytes read are.
    share = "{percentage:3.0f}%|{bar}| " if size else ""
    shape = "{desc}: " + share + "{elapsed}{postfix}"
    bar = tqdm(desc="priors", total=size, bar_format=shape, disable=hidden)
    with closing(stored), bar:
        for sample, _, found in make_all(requests, stored):
            if isinstance(found, Made):
                counts["samples"] += 1
                counts["made" if found.fresh else "stored"] += 1
                counts["cut_texts"] += found.prior.truncated > 0
                counts["cut_words"] += found.prior.cut_words
                roundtrip = roundtrip or found.roundtrip
                count_made(sample, found, skips)
                if found.damaged:
                    tqdm.write(f"damaged prior set aside, made anew: {found.damaged}")
            else:
                # A failure that is not the clip's fault is not recorded: the next run tries the clip again.
                count_failed(sample, found, skips)
            bar.update(max(0, sample.offset - bar.n))
            done = {name: counts[name] for name in ("stored", "made")}
            bar.set_postfix({**done, **({"left out": skips.total} if skips.total else {})}, refresh=False)
        bar.update(size - bar.n)
    return roundtrip


def _forecast(data: DataArguments, prior: PriorArguments, settings: PriorSettings, engine: Engine) -> int:
    """Print the cost of the missing priors; no model is loaded. Returns as `run`."""
    assert data.data is not None
    store, skips, seen = PriorStore(Path(prior.prior_dir)), SkipLog(), dict[str, bool]()
    with DigestCache(store.folder, writes=False) as cache:
        requests = prior.requests(
            read_samples(data.data, data.video_root, skips, limit=data.limit),
            skips,
            name=prior.name(engine.device, settings),
            digest=cache.digest,
        )

        def texts() -> Iterator[str]:
            for _, request in requests:
                if request.key not in seen:
                    seen[request.key] = request.key in store
                    if not seen[request.key]:
                        yield request.text

        cost: ExtractionCost | str
        if prior.source is None:
            options = prior.cost_options(engine.device)
            cost = extraction_cost(texts(), prior.reading(settings), prior.teacher, **options)
            cost = replace(cost, stored=sum(seen.values()))
        else:
            missing = sum(1 for _ in texts())
            cost = f"priors: {len(seen) - missing} stored, {missing} to make; no video model is needed"
    if PartialState().is_main_process:
        print(cost)
        if skips.total:
            print(skips.summary())
    return from_main(1 if skips.total else 0)


if __name__ == "__main__":
    sys.exit(main())
