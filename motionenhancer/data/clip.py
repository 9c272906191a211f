"""A video as a row of a data file describes it: the file, the segment to show, and the frames."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Keys of a video part, in the words of qwen-vl-utils, and the fields of `Clip` that they set.
CLIP_KEYS = {
    "video_start": "start",
    "video_end": "end",
    "fps": "fps",
    "nframes": "num_frames",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}


@dataclass(frozen=True)
class Clip:
    """A video file and how to show it, according to its row. It can be opened like a path.

    If the row names only the file, the video is a plain `Path`.

    Attributes:
        path: the file.
        start, end: seconds since the file's first frame. Only frames with `start <= time <= end` are shown,
            as in qwen-vl-utils.
        fps: frames per second that a student sees; replaces the value of the run.
        num_frames: number of evenly spaced frames that a student sees; replaces the run's number or rate. A
            shorter clip shows all of its frames.
        min_frames, max_frames: limits of the number of frames at a rate; replace the limits of the run.
        min_pixels, max_pixels: limits of the pixels of a frame as the student sees it, if its size is not
            fixed.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def absolute(self) -> Clip:
        """Return the same clip with an absolute path."""
        return replace(self, path=self.path.absolute())

    def __str__(self) -> str:
        if self.start is None and self.end is None:
            return str(self.path)
        end = "the end" if self.end is None else f"{self.end:g} s"
        return f"{self.path} ({self.start or 0:g} s to {end})"


def clip_of(path: Path, said: Mapping[str, Any]) -> Path | Clip:
    """Return a video with the keys of its row: a `Clip`, or `path` if no key has an effect.

    Args:
        path: the file.
        said: key of `CLIP_KEYS` → value.

    Raises:
        ValueError: a value is out of range, or two exclude each other.

    Example:
        >>> clip_of(Path("a.mp4"), {"video_start": 2}).start
        2.0
        >>> clip_of(Path("a.mp4"), {"video_start": 0})
        PosixPath('a.mp4')
    """
    given = {key: _number(key, value) for key, value in said.items()}
    if "nframes" in given and (other := given.keys() & {"fps", "min_frames", "max_frames"}):
        raise ValueError(f"'nframes' and {min(other)!r} exclude each other")
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if given.get(low, 0) > given.get(high, math.inf):
            raise ValueError(f"{low!r} must be at most {high!r}, got {given[low]} and {given[high]}")
    start = given.get("video_start", 0)
    if (end := given.get("video_end", math.inf)) <= start:
        raise ValueError(f"'video_end' must be after 'video_start', got {end:g} and {start:g} seconds")
    if start == 0:
        given.pop("video_start", None)  # A segment that starts at the first frame equals one without a start.
    return Clip(path, **{CLIP_KEYS[key]: value for key, value in given.items()}) if given else path


def _number(key: str, value: Any) -> Any:
    seconds = key in ("video_start", "video_end")
    whole = not seconds and key != "fps"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    if not number or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number of seconds" if seconds else "a number"
        raise ValueError(f"{key!r} must be {kind}, got {value!r}")
    if value < 0 or (value == 0 and key != "video_start"):
        least = "at least 0" if key == "video_start" else "above 0"
        raise ValueError(f"{key!r} must be {least}, got {value!r}")
    return int(value) if whole else float(value)


def segment_of(video: Path | Clip) -> Path | Clip:
    """The segment of a video that a teacher sees. The student's frame sampling has no effect on it."""
    if not isinstance(video, Clip) or (video.start is None and video.end is None):
        return Path(video)
    return Clip(video.path, video.start, video.end)


def named_by(digest: str, video: Path | Clip) -> str:
    """The part of a prior's key that names the video: digest of the file's bytes, and the segment if any."""
    shown = segment_of(video)
    return f"{digest} {shown.start} {shown.end}" if isinstance(shown, Clip) else digest


def is_file(path: Path) -> bool:
    """Whether a file exists; False for an impossible file name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null in it
        return False
