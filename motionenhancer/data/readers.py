"""Stream samples from data sets, in every form that `read_samples` lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from .conversation import convert
from .sample import Sample
from .skips import SkipLog
from .sources import open_source


def read_samples(
    path: Any,
    video_root: str | Path | None = None,
    on_skip: SkipLog | None = None,
    *,
    require_video: bool = True,
    limit: int | None = None,
) -> Iterator[Sample]:
    """Stream the samples of a data set. Rows that cannot be used are counted and reported.

    Each row has one of six forms, which differ in their keys:

    - LLaVA: ``{"id", "video": str or list, "image"?, "conversations": [{"from": "human" | "gpt" | "system",
      "value": "<video>\\n..."}]}``
    - messages: ``{"id"?, "messages": [{"role", "content": str with <video> tags or list of parts}],
      "videos": [...]}``; a part ``{"type": "video", "video": path}`` may name its file itself
    - MotionBench-Train, MotionVid-QA, VideoChat2-IT and alpaca: see `motion_sets.as_conversation`

    A key that changes what is learnt is applied, or the row is skipped as ``unsupported key``; see
    ``docs/data.md``. Neither a jsonl file nor a json array is held in memory.

    Args:
        path: the data file, utf-8; or any other source that `sources.open_source` takes.
        video_root: folder of relative paths of videos and images; by default the folder of the data file.
        on_skip: counts skipped lines by line, id and reason; its notes count unknown keys.
        require_video: leave out samples without a video.
        limit: maximum number of samples.

    Raises:
        ValueError: at the call, the data file or video_root does not exist; at the end of the iteration, no
            sample of the file was usable, with the first reasons.

    >>> import json, tempfile
    >>> turns = [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", "value": "A ring."}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "a.mp4").touch()
    ...     data = Path(folder, "train.json")
    ...     _ = data.write_text(json.dumps([{"id": "first", "video": "a.mp4", "conversations": turns}]))
    ...     [sample.id for sample in read_samples(data)]
    ['first']
    """
    source = open_source(path)
    root = source.root if video_root is None else Path(video_root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"video_root must be a folder, {root} {what}")
    log = SkipLog() if on_skip is None else on_skip

    def samples() -> Iterator[Sample]:
        usable = 0
        for line, offset, value, problem in source.rows():
            if problem:
                log.add("invalid json", line=line, detail=problem)
                continue
            sample = convert(value, line, root, log, offset=offset, require_video=require_video)
            if sample is not None:
                usable += 1
                yield sample
        if not usable:
            first = "\n".join(f"  {entry}" for entry in log.entries[:5]) or "  the file holds no sample"
            reasons = f"{log.summary(examples=0)}; the first reasons:\n{first}"
            raise ValueError(f"no usable sample in {source.name}; {reasons}")

    return islice(samples(), limit)


def load_samples(path: Any, video_root: str | Path | None, limit: int | None, skips: SkipLog) -> list[Sample]:
    """Return the samples of a data file as a list. A repeated id gets a number.

    Raises:
        ValueError: as `read_samples`.
    """
    seen: Counter[str] = Counter()
    samples, taken = [], set()
    for sample in read_samples(path, video_root, skips, limit=limit):
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
