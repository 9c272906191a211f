"""A benchmark's question, and the helpers that its readers share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

from motionenhancer.data.clip import Clip
from motionenhancer.data.rows import stream_rows
from motionenhancer.data.skips import SkipLog

__all__ = ["Question", "video_stem"]

_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts")


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, as published.

    id: unique in its benchmark.
    video: name of its clip in the file, with or without extension; a :class:`Clip` of that name where the
        file says which part of it is shown, or with which frames.
    text: the question, untouched.
    answer: the right answer; None where it is not public.
    tasks: codes of the tasks it counts for, mostly one.
    options: texts of the options, where the file gives them apart from the question.
    line: 1-based line of the file where its entry starts.
    """

    id: str
    video: str | Clip
    text: str
    answer: str | None
    tasks: tuple[str, ...]
    options: tuple[str, ...] = ()
    line: int = 0


def video_stem(name: str | Clip) -> str:
    """Return ``name`` without the extension of a video file; any other dot stays.

    >>> video_stem("clip_0.5_2.MP4"), video_stem("clip_0.5_2")
    ('clip_0.5_2', 'clip_0.5_2')
    """
    name = fspath(name).strip()
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in _VIDEO_SUFFIXES else name


def read_rows(path: Path, log: SkipLog) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a json or jsonl file with their lines; whatever is not one is counted in ``log``.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"path must be a json or jsonl file, {path} {what}")
    for line, _, value, problem in stream_rows(path):
        if problem:
            log.add("invalid json", line=line, detail=problem)
        elif not isinstance(value, dict):
            log.add("missing fields", line=line, detail=f"must be an object, got {type(value).__name__}")
        else:
            yield line, value


def filled(value: Any) -> bool:
    """Whether ``value`` is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())
