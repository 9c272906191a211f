"""The samples of a run: a data file as its flags name it, streamed or as a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from motionenhancer.data.readers import read_samples
from motionenhancer.data.sample import Sample
from motionenhancer.data.skips import SkipLog

__all__ = ["load_samples", "stream_samples"]


def stream_samples(
    data: str | Path, video_root: str | Path | None, limit: int | None, skips: SkipLog
) -> Iterator[Sample]:
    """Yield the usable samples of a data file, the first `limit` of them; bad lines are counted in `skips`.

    Raises:
        ValueError: at the call, the data file or the video folder is missing or `limit` is below 1; at the
            end, nothing in the file is usable.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if not Path(data).is_file():
        what = "is a folder" if Path(data).is_dir() else "no such file"
        raise ValueError(f"--data {data}: {what}")
    if video_root is not None and not Path(video_root).is_dir():
        raise ValueError(f"--video_root {video_root}: no such folder")
    return islice(read_samples(data, video_root, skips), limit)


def load_samples(
    data: str | Path, video_root: str | Path | None, limit: int | None, skips: SkipLog
) -> list[Sample]:
    """Return every usable sample of a data file; an id that occurs again gets a number.

    Raises:
        ValueError: the data file or the video folder is missing, or nothing in the file is usable.
    """
    seen: Counter[str] = Counter()
    samples, taken = [], set()
    for sample in stream_samples(data, video_root, limit, skips):
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
