"""Read a whole data file's motion priors from a teacher into a store.

`python -m motionenhancer.extract --teacher DIR --data FILE --video_root DIR --prior_dir DIR`
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from .arguments import DataArguments, PriorArguments, parse_arguments
from .data import Sample, SkipLog, read_samples
from .extraction.digests import DigestCache
from .extraction.engines import Done, open_engine
from .extraction.estimate import Estimate, check_settings, estimate
from .extraction.job import Job
from .extraction.making import PARTLY_UNKNOWN, MadePriors, make_priors
from .extraction.planning import PriorRequest, digest_videos, plan_priors, share_requests, stream_requests
from .extraction.workload import Workload, tabulate
from .prior import PriorSettings
from .processes import from_main, join_processes
from .report import versions, write_json
from .toy.world import ToyFolder, build_toy

__all__ = [
    "MadePriors",
    "PriorRequest",
    "PriorSettings",
    "default_toy",
    "digest_videos",
    "load_samples",
    "main",
    "make_priors",
    "plan_priors",
    "share_requests",
    "use_toy_defaults",
]

DEFAULT_TOY = "runs/toy"
REPORT = "extraction.json"


@dataclass
class ExtractArguments:
    """How the work is done; none of it changes a prior."""

    decode_workers: int = field(
        default=2, metadata={"help": "Threads a process that decode clips ahead of the teacher."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print evaluations, bytes and memory, and load no model."}
    )
    engine: str = field(
        default="local",
        metadata={
            "help": "local: this process and those it was launched with. ray: workers of a cluster.",
            "choices": ["local", "ray"],
        },
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Cluster to join. Default: a running one, or one on this machine."}
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": "Workers, each with a teacher. Default: one a GPU, or one in all."}
    )
    ray_cpus: int | None = field(
        default=None, metadata={"help": "Cores that a worker reserves and computes with. Default: 1."}
    )

    def __post_init__(self) -> None:
        for name in ("decode_workers", "ray_workers", "ray_cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for name in ("ray_address", "ray_workers", "ray_cpus"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs --engine ray, got --engine {self.engine}")


def stream_samples(data: DataArguments, skips: SkipLog) -> Iterator[Sample]:
    """The usable samples of the data file, the first `limit` of them, bad lines reported in `skips`.

    Raises:
        ValueError: at the call, the data file or the video folder is missing or `limit` is no count; at the
            end, nothing in the file is usable.
    """
    assert data.data is not None
    if data.limit is not None and data.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {data.limit}")
    if not Path(data.data).is_file():
        what = "is a folder" if Path(data.data).is_dir() else "no such file"
        raise ValueError(f"--data {data.data}: {what}")
    if data.video_root is not None and not Path(data.video_root).is_dir():
        raise ValueError(f"--video_root {data.video_root}: no such folder")
    return islice(read_samples(data.data, data.video_root, skips), data.limit)


def load_samples(data: DataArguments, skips: SkipLog) -> list[Sample]:
    """Every usable sample of the data file in a list, ids that are met again numbered.

    Raises:
        ValueError: the data file or the video folder is missing, or nothing in the file is usable.
    """
    seen: Counter[str] = Counter()
    samples, taken = [], set()
    for sample in stream_samples(data, skips):
        name = sample.id
        seen[name] += 1
        if name in taken:
            # Priors are looked up by id, so two samples must never share one.
            skips.note("repeated id, numbered")
            while (numbered := f"{name}#{max(2, seen[name])}") in taken:
                seen[name] += 1
            sample = replace(sample, id=numbered)
        taken.add(sample.id)
        samples.append(sample)
    return samples


def use_toy_defaults(data: DataArguments, prior: PriorArguments) -> ToyFolder | None:
    """Fill in the toy world for whatever was left out; returns it if any of it is used."""
    if data.data is None and data.video_root is not None:
        raise ValueError(f"--video_root {data.video_root} needs --data, the file that names its clips")
    if prior.teacher is not None and data.data is not None:
        return None
    toy = default_toy()
    prior.teacher = prior.teacher or str(toy.teacher)
    if data.data is None:
        data.data, data.video_root = str(toy.train), str(toy.videos)
    return toy


def default_toy() -> ToyFolder:
    """The toy world of commands typed without arguments, made on first use by one process."""
    with PartialState().main_process_first():
        return build_toy(Path(DEFAULT_TOY), clips=480, test_clips=120)


def main(argv: list[str] | None = None) -> int:
    data, prior, how = parse_arguments(
        (DataArguments, PriorArguments, ExtractArguments), argv, prog="python -m motionenhancer.extract"
    )
    try:
        return run(data, prior, how)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(data: DataArguments, prior: PriorArguments, how: ExtractArguments) -> int:
    """One process's part of an extraction; all of them return the same.

    Returns:
        0, or 1 if anything was left out.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong.
    """
    state = join_processes()
    began = time.time()
    settings = prior.settings()
    use_toy_defaults(data, prior)
    assert data.data is not None
    assert prior.teacher is not None
    check_settings(settings, prior.teacher)
    prior.identity(state.device)  # raises for a size that the teacher does not take
    with open_engine(how.engine, state, how.ray_address, how.ray_workers, how.ray_cpus or 1) as engine:
        teacher = prior.teacher_id(engine.device)
        root = None if data.video_root is None else Path(data.video_root)
        job = Job(Path(data.data), root, prior, how.decode_workers)
        skips = SkipLog()
        with DigestCache(job.store.folder, writes=not how.dry_run) as cache:
            work = plan(job, data, teacher, skips, state, cache)
        if how.dry_run:
            if state.is_main_process:
                print(dry_run(job, work, engine.device))
                if skips.total:
                    print(skips.summary())
            return 1 if skips.total else 0
        report = {
            "teacher": {"path": prior.teacher, "id": teacher},
            "data": data.data,
            "limit": data.limit,
            "prompt_source": prior.prompt_source,
            "settings": asdict(settings),
            "engine": how.engine,
            "processes": engine.workers,
            "versions": versions(),
        }
        if state.is_main_process:
            write_report(job.store.folder, {"status": "running", **report})
        done = engine.run(job, work)
        if state.is_main_process:
            finish(job, work, done, report, skips, began)
        return from_main(1 if skips.total else 0)


def plan(
    job: Job, data: DataArguments, teacher: str, skips: SkipLog, state: PartialState, cache: DigestCache
) -> Workload:
    """What there is to do, complete in the main process and empty in the others.

    Every process reads the data file and its share of the clips; the main process joins what they found.

    Args:
        job: of the extraction.
        data: where its samples are.
        teacher: the teacher's id.
        skips: receives, in the main process, what all of them left out.
        state: of the processes.
        cache: digests of clips.
    """
    main = state.is_main_process
    mine = skips if main else SkipLog(shout=0)
    # Every process meets the same bad lines: only one of them warns and counts.
    samples = stream_samples(data, skips if main else SkipLog(shout=0))
    requests = stream_requests(
        tqdm(samples, desc="planned", unit="sample", disable=not main, leave=False),
        teacher,
        job.prior.settings(),
        job.prior.prompt_source,
        mine,
        cache=cache,
        workers=job.decode_workers,
        part=state.process_index,
        parts=state.num_processes,
    )
    everyone = gather_object([(tabulate(requests, job.store), None if main else mine)])
    if not main:
        return Workload.of([])
    skips.merge(log for _, log in everyone if log is not None)
    return Workload.of([items for items, _ in everyone])


def dry_run(job: Job, work: Workload, device: torch.device) -> Estimate:
    """What making the missing priors will take; no model is loaded."""
    identity = job.prior.identity(device)
    identity.pop("vae_tiling")
    assert job.prior.teacher is not None
    missing = work.take(work.missing())
    return estimate(
        (request.text for request in job.requests(missing)),
        len(work.stored()),
        job.prior.settings(),
        job.prior.teacher,
        **identity,
        split_batch=job.prior.split_batch,
    )


def finish(
    job: Job, work: Workload, done: Done, report: dict[str, Any], skips: SkipLog, began: float
) -> None:
    """Print and write what an extraction did and left out.

    Args:
        job: the report is written beside its priors.
        work: all of it.
        done: what came of it.
        report: what the extraction was.
        skips: what was left out before; receives the samples that got no prior.
        began: seconds since the epoch.
    """
    for _ in range(done.damaged):
        skips.note("damaged priors made anew")
    if done.unknown:
        skips.notes[PARTLY_UNKNOWN] += done.unknown
        print(f"{done.unknown} {PARTLY_UNKNOWN}: such characters are never words")
    samples = len(work.items)
    for result in done.refused:
        lost = work.samples(result.number)
        samples -= len(lost)
        for name, line in job.places(lost):
            skips.add(result.reason, id=name, line=line, detail=result.detail)
    results = {
        "samples": samples,
        "stored": done.stored,
        "made": done.made,
        **({"made_each": done.made_each} if done.made_each else {"worker_deaths": done.deaths}),
        "seconds": round(time.time() - began, 1),
        "roundtrip": done.roundtrip,
    }
    folder = job.store.folder
    path = write_report(folder, {"status": "finished", **report, **results, "skipped": skips.to_json()})
    print(f"{samples} samples have their prior in {folder} ({done.made} made now)")
    if done.roundtrip:
        print(f"inversion error of the first clip: {done.roundtrip}")
    if skips.total:
        print(skips.summary())
        print(f"all of them: {path}")


def write_report(folder: Path, body: dict[str, Any]) -> Path:
    """Write `extraction.json` whole, by rename; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    write_json(path, body)
    return path


if __name__ == "__main__":
    sys.exit(main())
