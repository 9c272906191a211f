"""Frames from video files: sampled over the clip, decoded as a stream, checked for damage."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motionenhancer.data.clip import Clip
from motionenhancer.data.decode import (
    Progress,
    Timeline,
    VideoError,
    av,
    decode,
    is_passing,
    judge,
    say,
    scan,
)

__all__ = ["Video", "VideoError", "VideoInfo", "check_video", "content_digest", "read_frames"]


TIE = 1e-6
"""Seconds; two frames whose distances to a wanted time differ by less are equally near."""


@dataclass(frozen=True)
class Video:
    """Sampled frames of a clip.

    frames: (n, h, w, 3) uint8, upright.
    timestamps: (n,) float64, seconds since the clip's first frame; equal where a frame was taken twice.
    fps: mean frame rate of the file; duration: seconds, the last frame's own time included.
    decoded: frames that came out of the decoder, of the ``source_frames`` that the file holds; decoding stops
        once the last wanted frame is there.
    errors: packets that could not be decoded.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float
    duration: float
    decoded: int
    source_frames: int
    errors: int = 0


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: frames, upright size in pixels, mean frame rate, seconds, undecodable packets."""

    frames: int
    height: int
    width: int
    fps: float
    duration: float
    errors: int = 0


def _upright(frame: Any) -> int:
    """Return how many quarter turns counter-clockwise show the frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _target_size(
    height: int, width: int, size: tuple[int, int] | None, max_pixels: int | None
) -> tuple[int, int]:
    if size is not None:
        return size
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width))
    h = max(1, min(max_pixels, math.floor(height * scale)))
    return h, max(1, min(math.floor(width * scale), max_pixels // h))


def _to_array(frame: Any, turns: int, size: tuple[int, int]) -> np.ndarray:
    height, width = size if turns % 2 == 0 else size[::-1]
    picture = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns))


def _choose_times(
    timeline: Timeline, num_frames: int | None, fps: float | None, max_frames: int | None
) -> np.ndarray:
    first, last = timeline.times[0], timeline.times[-1]
    count = len(timeline.times)
    most = max_frames if max_frames is not None else max(count, num_frames or 0)
    if num_frames is not None:
        wanted = min(num_frames, most)
    elif fps is not None:
        wanted = max(1, math.floor(timeline.duration * fps + 1e-6))
        if wanted <= min(most, count):
            return np.minimum(first + np.arange(wanted) / fps, last)
        wanted = min(most, count)
    elif most >= count:
        return timeline.times
    else:
        wanted = most
    if wanted == 1:
        return np.array([(first + last) / 2])
    return np.linspace(first, last, wanted)


def _check_number(name: str, value: Any, *, whole: bool = True) -> None:
    if value is None:
        return
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, got {value!r}")


def _cut(path: Path, timeline: Timeline, start: float | None, end: float | None) -> Timeline:
    """The part of a timeline from ``start`` to ``end`` seconds after its first frame, both included."""
    since = timeline.times - timeline.times[0]
    first, last = 0.0 if start is None else start, math.inf if end is None else end
    kept = timeline.times[(since >= first - TIE) & (since <= last + TIE)]
    if not len(kept):
        raise VideoError(path, f"has no frame from {first:g} s to {last:g} s")
    length = timeline.duration / len(timeline.times)
    duration = float(kept[-1] - kept[0]) + length
    return Timeline(kept, duration, timeline.fps, timeline.timed)


def _check_arguments(
    num_frames: Any, fps: Any, max_frames: Any, max_pixels: Any, size: Any, min_frames: Any
) -> None:
    _check_number("num_frames", num_frames)
    _check_number("fps", fps, whole=False)
    _check_number("max_frames", max_frames)
    _check_number("max_pixels", max_pixels)
    _check_number("min_frames", min_frames)
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames and fps exclude each other, got {num_frames} and {fps}")
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise TypeError(f"size must be (height, width), got {size!r}")
        _check_number("size[0]", size[0])
        _check_number("size[1]", size[1])
        if max_pixels is not None:
            raise ValueError(f"size and max_pixels exclude each other, got {size} and {max_pixels}")


def read_frames(
    path: str | Path | Clip,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
    size: tuple[int, int] | None = None,
    min_frames: int = 1,
    start: float | None = None,
    end: float | None = None,
) -> Video:
    """Decode frames of a clip, sampled over its time, in one pass that keeps only what is asked for.

    Times are taken from the packets, so a variable frame rate and a wrong header do no harm. For each wanted
    time the nearest frame is kept, the earlier of two equally near. Frames are turned upright.

    Parameters
    ----------
    path: any file that ffmpeg reads; of a :class:`Clip` its segment, unless start or end are given.
    num_frames: exactly so many, evenly from the first frame to the last; a shorter clip repeats frames.
    fps: so many a second from the first frame on, never more than the file holds.
    max_frames: with fps or alone: if there are more, so many evenly from the first frame to the last.
    max_pixels: shrink frames to at most this many pixels, shape kept.
    size: (height, width) to resize to.
    min_frames: refuse a file with fewer frames; 2 refuses stills.
    start, end: seconds since the file's first frame; frames before start or after end are not there.

    Without num_frames, fps and max_frames all frames are returned.

    Returns
    -------
    Video

    Raises
    ------
    VideoError: missing, empty, not a video, without video stream or frames, truncated, damaged, too short.
    ValueError, TypeError: an argument out of range, or two that exclude each other.

    >>> import tempfile
    >>> from motionenhancer.toy.encode import encode_video
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     encode_video(f"{folder}/a.mp4", np.zeros((8, 16, 32, 3), np.uint8), fps=8)
    ...     video = read_frames(f"{folder}/a.mp4", num_frames=3)
    >>> video.frames.shape, video.timestamps.tolist(), video.duration
    ((3, 16, 32, 3), [0.0, 0.375, 0.875], 1.0)
    """
    _check_arguments(num_frames, fps, max_frames, max_pixels, size, min_frames)
    if isinstance(path, Clip) and start is None and end is None:
        start, end = path.start, path.end
    path = Path(path)
    whole = scan(path)
    timeline = whole if start is None and end is None else _cut(path, whole, start, end)
    held = len(timeline.times)
    if held < min_frames:
        raise VideoError(path, f"has {held} frame{'s' if held > 1 else ''}, needs at least {min_frames}")
    targets = _choose_times(timeline, num_frames, fps, max_frames)

    progress = Progress()
    pictures: list[np.ndarray] = []
    stamps: list[float] = []
    shape: tuple[int, int] | None = None
    before: tuple[float, Any] | None = None

    def keep(time: float, frame: Any) -> None:
        nonlocal shape
        turns = _upright(frame)
        if shape is None:
            upright = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
            shape = _target_size(*upright, size, max_pixels)
        again = bool(stamps) and stamps[-1] == time
        pictures.append(pictures[-1] if again else _to_array(frame, turns, shape))
        stamps.append(time)

    frames = decode(path, whole, progress)
    try:
        for time, frame in frames:
            if not timeline.times[0] - TIE <= time <= timeline.times[-1] + TIE:
                continue
            while len(stamps) < len(targets) and targets[len(stamps)] <= time:
                wanted = targets[len(stamps)]
                earlier = before is not None and wanted - before[0] <= time - wanted + TIE
                keep(*(before if before is not None and earlier else (time, frame)))
            if len(stamps) == len(targets):
                break
            before = (time, frame)
    except (av.error.FFmpegError, MemoryError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        reason = f"a decoded frame cannot be converted ({say(error)})"
        raise VideoError(path, reason, is_passing(error)) from None
    finally:
        frames.close()  # type: ignore[attr-defined]
    judge(path, whole, progress, complete=len(stamps) < len(targets))
    while before is not None and len(stamps) < len(targets):
        keep(*before)
    return Video(
        frames=np.stack(pictures),
        timestamps=np.array(stamps) - whole.times[0],
        fps=timeline.fps,
        duration=timeline.duration,
        decoded=progress.decoded,
        source_frames=held,
        errors=progress.errors,
    )


def check_video(path: str | Path) -> VideoInfo:
    """Decode a whole clip, keeping nothing, and say what it holds.

    Raises
    ------
    VideoError: as :func:`read_frames`.
    """
    path = Path(path)
    timeline = scan(path)
    progress = Progress()
    shape = (0, 0)
    for _, frame in decode(path, timeline, progress):
        if progress.decoded == 1:
            shape = (frame.height, frame.width) if _upright(frame) % 2 == 0 else (frame.width, frame.height)
    judge(path, timeline, progress, complete=True)
    return VideoInfo(progress.decoded, *shape, timeline.fps, timeline.duration, progress.errors)


def content_digest(path: str | Path | Clip) -> str:
    """Return the sha256 of a file's bytes in hex, whatever the file's name; read in pieces.

    Raises
    ------
    VideoError: a file that is not there or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VideoError(Path(path), f"cannot be read ({say(error)})", is_passing(error)) from None
