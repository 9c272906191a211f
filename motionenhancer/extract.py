"""Read a whole data file's motion priors from a teacher into a store.

`python -m motionenhancer.extract --teacher DIR --data FILE --video_root DIR --prior_dir DIR`
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from .costs import ExtractionCost, extraction_cost
from .data import Sample, SkipLog
from .data.loading import stream_samples
from .data.video import VideoError
from .files import write_json
from .flags import parse_arguments
from .priors.digests import DigestCache
from .priors.engine import Engine
from .priors.maker import DeadTeacher, Made, RefusedClip, Stored, make_all, refusal_of
from .priors.prior import PARTLY_UNKNOWN, PriorError, PriorSettings, check_settings
from .priors.requests import PriorRequest, request_priors
from .priors.storage import PriorStore, prior_keys
from .processes import from_main, join_processes
from .report.run_report import EXTRACTION as REPORT
from .report.run_report import versions
from .settings import DataArguments, ExtractArguments, MakerArguments, PriorArguments
from .toy.defaults import use_toy_defaults


@dataclass
class Counts:
    """What one process of an extraction did.

    Attributes:
        samples: samples that have their prior.
        stored: of these, priors that were in the store.
        made: priors made.
        deaths: actors that died and were replaced.
        roundtrip: inversion error of a first clip, if it was asked for.
    """

    samples: int = 0
    stored: int = 0
    made: int = 0
    deaths: int = 0
    roundtrip: dict[str, float] | None = None


def main(argv: list[str] | None = None) -> int:
    data, prior, settings, how, command = parse_arguments(
        (DataArguments, PriorArguments, PriorSettings, MakerArguments, ExtractArguments),
        argv,
        prog="python -m motionenhancer.extract",
    )
    try:
        return run(data, prior, settings, how, dry_run=command.dry_run)
    except (ValueError, OSError, DeadTeacher) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: start the same command again to go on", file=sys.stderr)
        return 130


def run(
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    how: MakerArguments,
    *,
    dry_run: bool = False,
) -> int:
    """Do one process's part of an extraction; all processes return the same.

    Returns:
        0, or 1 if anything was left out.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong.
        DeadTeacher: no more priors can be made.
    """
    state = join_processes()
    began = time.time()
    use_toy_defaults(data, prior)
    assert data.data is not None
    assert prior.teacher is not None
    check_settings(settings, prior.teacher)
    prior.identity(state.device)  # Raises for a size that the teacher does not take.
    store, skips = PriorStore(Path(prior.prior_dir)), SkipLog()
    # Every process meets the same bad lines: one of them counts them.
    lines = skips if state.is_main_process else SkipLog(shout=0)
    with how.open() as engine, DigestCache(store.folder, writes=not dry_run) as cache:
        teacher_id = prior.teacher_id(engine.device)
        requests = request_priors(
            stream_samples(data.data, data.video_root, data.limit, lines),
            prior.prompt_source,
            skips,
            name=prior_keys(teacher_id, settings),
            digest=cache.digest,
            workers=how.prior_workers,
            part=0 if dry_run else state.process_index,
            parts=1 if dry_run else state.num_processes,
        )
        if dry_run:
            if state.is_main_process:
                print(_forecast(requests, store, prior, settings, engine.device))
                if skips.total:
                    print(skips.summary())
            return from_main(1 if skips.total else 0)
        report = {
            "teacher": {"path": prior.teacher, "id": teacher_id},
            "data": data.data,
            "video_root": data.video_root,
            "limit": data.limit,
            "prompt_source": prior.prompt_source,
            "settings": asdict(settings),
            "engine": how.prior_engine,
            "processes": state.num_processes * engine.teachers,
            "versions": versions(),
        }
        if state.is_main_process:
            _write_report(store.folder, {"status": "running", **report})
        counts = _make(requests, Path(data.data), store, prior, settings, teacher_id, engine, skips)
    everyone = gather_object([(counts, skips)])
    if not state.is_main_process:
        return from_main(0)
    total = SkipLog()
    total.merge(log for _, log in everyone)
    _finish(store.folder, [part for part, _ in everyone], total, report, began)
    return from_main(1 if total.total else 0)


def _make(
    requests: Iterator[tuple[Sample, PriorRequest]],
    data: Path,
    store: PriorStore,
    prior: PriorArguments,
    settings: PriorSettings,
    teacher_id: str,
    engine: Engine,
    skips: SkipLog,
) -> Counts:
    """Make what is missing, with a bar over the bytes of the data file."""
    counts = Counts()
    maker = engine.maker(prior.absolute().load, teacher_id, settings, roundtrip=prior.measure_roundtrip)
    stored = Stored(store, maker, prior_keys(teacher_id, settings), strict=True, retry=True)
    size = data.stat().st_size
    bar = tqdm(
        desc="priors",
        total=size,
        unit="B",
        unit_scale=True,
        disable=not PartialState().is_main_process,
    )
    with closing(stored), bar:
        for sample, _, found in make_all(requests, stored):
            _count(counts, sample, found, skips)
            bar.update(max(0, sample.offset - bar.n))
            left_out = {"left out": skips.total} if skips.total else {}
            bar.set_postfix({"stored": counts.stored, "made": counts.made, **left_out}, refresh=False)
        bar.update(size - bar.n)
    counts.deaths = getattr(maker, "deaths", 0)
    return counts


def _count(counts: Counts, sample: Sample, found: Made | Exception, skips: SkipLog) -> None:
    if isinstance(found, Made):
        counts.samples += 1
        if found.prior.unknown:
            skips.note(PARTLY_UNKNOWN)
        counts.stored += not found.fresh
        counts.made += found.fresh
        counts.roundtrip = counts.roundtrip or found.roundtrip
        if found.damaged:
            skips.note("damaged priors made anew")
            tqdm.write(f"damaged prior set aside, made anew: {found.damaged}")
        return
    if not isinstance(found, VideoError | PriorError | RefusedClip):
        # Not the clip's fault: it is tried again when the command is typed again.
        detail = f"{type(found).__name__}: {found}"
        skips.add("no prior: an attempt failed", id=sample.id, line=sample.line, detail=detail)
        return
    refusal = refusal_of(found)
    skips.add(refusal.reason, id=sample.id, line=sample.line, detail=refusal.detail)


def _forecast(
    requests: Iterator[tuple[Sample, PriorRequest]],
    store: PriorStore,
    prior: PriorArguments,
    settings: PriorSettings,
    device: torch.device,
) -> ExtractionCost:
    """Return what making the missing priors will take; no model is loaded."""
    assert prior.teacher is not None
    stored: set[str] = set()
    missing: set[str] = set()

    def texts() -> Iterator[str]:
        for _, request in requests:
            if request.key in stored or request.key in missing:
                continue
            if request.key in store:
                stored.add(request.key)
            else:
                missing.add(request.key)
                yield request.text

    found = extraction_cost(texts(), settings, prior.teacher, **prior.cost_options(device))
    return replace(found, stored=len(stored))


def _finish(folder: Path, parts: list[Counts], skips: SkipLog, report: dict[str, Any], began: float) -> None:
    """Print and write what an extraction did and left out."""
    samples, made = (sum(getattr(part, name) for part in parts) for name in ("samples", "made"))
    deaths = sum(part.deaths for part in parts)
    roundtrip = next((part.roundtrip for part in parts if part.roundtrip), None)
    results = {
        "samples": samples,
        "stored": sum(part.stored for part in parts),
        "made": made,
        "made_each": [part.made for part in parts],
        "worker_deaths": deaths,
        "seconds": round(time.time() - began, 1),
        "roundtrip": roundtrip,
    }
    path = _write_report(folder, {"status": "finished", **report, **results, "skipped": skips.to_json()})
    print(f"{samples} samples have their prior in {folder} ({made} made now)")
    if unknown := skips.notes[PARTLY_UNKNOWN]:
        print(f"{unknown} {PARTLY_UNKNOWN}: such characters are never words")
    if roundtrip:
        print(f"inversion error of the first clip: {roundtrip}")
    if skips.total:
        print(skips.summary())
        print(f"all of them: {path}")


def _write_report(folder: Path, body: dict[str, Any]) -> Path:
    path = folder / REPORT
    write_json(path, body)
    return path


if __name__ == "__main__":
    sys.exit(main())
