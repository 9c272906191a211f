"""Read a whole data file's motion priors from a teacher into a store.

`python -m motionenhancer.extract --teacher DIR --data FILE --video_root DIR --prior_dir DIR`
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .arguments import DataArguments, PriorArguments, parse_arguments
from .data import Sample, SkipLog, read_samples
from .estimate import estimate
from .making import MadePriors, make_priors
from .planning import PriorRequest, digest_videos, plan_priors, share_requests
from .prior import PriorSettings
from .processes import join_processes
from .report import versions
from .store import PriorStore
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

    def __post_init__(self) -> None:
        if self.decode_workers < 1:
            raise ValueError(f"--decode_workers must be at least 1, got {self.decode_workers}")


def load_samples(data: DataArguments, skips: SkipLog) -> list[Sample]:
    """Every usable sample of the data file, bad lines reported in `skips`.

    Raises:
        ValueError: the data file or the video folder is missing, or nothing in the file is usable.
    """
    assert data.data is not None
    if data.limit is not None and data.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {data.limit}")
    if not Path(data.data).is_file():
        raise ValueError(f"--data {data.data}: no such file")
    if data.video_root is not None and not Path(data.video_root).is_dir():
        raise ValueError(f"--video_root {data.video_root}: no such folder")
    seen: Counter[str] = Counter()
    samples = []
    for sample in islice(read_samples(data.data, data.video_root, skips), data.limit):
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            # Priors are looked up by id, so two samples must never share one.
            skips.note("repeated id, numbered")
            sample = replace(sample, id=f"{sample.id}#{seen[sample.id]}")
        samples.append(sample)
    return samples


def use_toy_defaults(data: DataArguments, prior: PriorArguments) -> ToyFolder | None:
    """Fill in the toy world for whatever was left out; returns it if any of it is used."""
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
        return build_toy(Path(DEFAULT_TOY))


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
    teacher = prior.teacher_id(state.device)
    store = PriorStore(Path(prior.prior_dir))
    # Every process reads the data file: only one of them warns and counts.
    skips, mine = (SkipLog() if state.is_main_process else SkipLog(shout=0) for _ in range(2))
    samples = load_samples(data, skips)
    videos = sorted({sample.videos[0] for sample in samples if len(sample.videos) == 1})
    share = digest_videos(videos[state.process_index :: state.num_processes], how.decode_workers)
    digests = {video: digest for part in gather_object([share]) for video, digest in part.items()}
    requests = plan_priors(samples, teacher, settings, prior.prompt_source, skips, digests=digests)
    if how.dry_run:
        if state.is_main_process:
            identity = prior.identity(state.device)
            identity.pop("vae_tiling")
            assert prior.teacher is not None
            print(
                estimate(requests, store, settings, prior.teacher, **identity, split_batch=prior.split_batch)
            )
            if skips.total:
                print(skips.summary())
        return 1 if skips.total else 0
    report = {
        "teacher": {"path": prior.teacher, "id": teacher},
        "data": data.data,
        "limit": data.limit,
        "prompt_source": prior.prompt_source,
        "settings": asdict(settings),
        "processes": state.num_processes,
        "versions": versions(),
    }
    if state.is_main_process:
        write_report(store.folder, {"status": "running", **report})
    made = make_priors(
        share_requests(requests, state.num_processes)[state.process_index],
        store,
        settings,
        lambda: prior.load(state.device),
        mine,
        measure_roundtrip=prior.measure_roundtrip,
        decode_workers=how.decode_workers,
        describe=False,
    )
    counts = {"samples": len(made.keys), "stored": made.stored, "made": made.made}
    everyone = gather_object([(counts, mine, made.roundtrip)])
    skips.merge(log for _, log, _ in everyone)
    if state.is_main_process:
        finish(store, report, [(counts, found) for counts, _, found in everyone], skips, began)
    return 1 if skips.total else 0


def finish(
    store: PriorStore,
    report: dict[str, Any],
    parts: Sequence[tuple[dict[str, int], dict[str, float] | None]],
    skips: SkipLog,
    began: float,
) -> None:
    """Print and write what an extraction did and left out.

    Args:
        store: of the priors; the report is written beside them.
        report: what the extraction was.
        parts: counts of each process, and the inversion error where it was measured.
        skips: what all of them left out.
        began: seconds since the epoch.
    """
    counts = {name: sum(part[name] for part, _ in parts) for name in ("samples", "stored", "made")}
    roundtrip = next((found for _, found in parts if found), None)
    results = {**counts, "seconds": round(time.time() - began, 1), "roundtrip": roundtrip}
    path = write_report(store.folder, {"status": "finished", **report, **results, "skipped": skips.to_json()})
    print(f"{counts['samples']} samples have their prior in {store.folder} ({counts['made']} made now)")
    if roundtrip:
        print(f"inversion error of the first clip: {roundtrip}")
    if skips.total:
        print(skips.summary())
        print(f"all of them: {path}")


def write_report(folder: Path, body: dict[str, Any]) -> Path:
    """Write `extraction.json` whole, by rename; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    temporary = folder / f".{REPORT}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
