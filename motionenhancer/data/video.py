"""Read frames of video files: sample over the clip, decode as a stream, check for damage."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .clip import Clip
from .decode import BYTES, FRAMES, Progress, VideoError, av, decode, limit, opened, refuse_size, unreadable
from .timeline import Timeline, foretell, judge, measure, timelines

TIE = 1e-6
"""Seconds. Two frames whose distances to a requested time differ by less count as equally near."""

_LEAST = 16 * 16
"""Assumed number of pixels of a frame before its size is known."""

SKEW = math.tan(math.radians(1))
"""A rotation within one degree of a quarter turn counts as a quarter turn."""


@dataclass(frozen=True)
class Video:
    """Sampled frames of a clip.

    Attributes:
        frames: (n, h, w, 3) uint8, with the display matrix applied.
        timestamps: (n,) float64, seconds since the clip's first frame; equal if a frame is repeated.
        fps: mean frame rate of the clip.
        duration: seconds of the clip or its segment, including the display time of the last frame.
        decoded: number of decoded frames; decoding stops after a segment.
        source_frames: number of frames of the clip or its segment.
        errors: number of packets that failed to decode.
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
    """Content of a file: frames, upright size in pixels, mean frame rate, seconds, undecodable packets."""

    frames: int
    height: int
    width: int
    fps: float
    duration: float
    errors: int = 0


class _Turn(NamedTuple):
    """How a decoded picture becomes the displayed one: first transposed, then flipped."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def shown(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.transposed else (height, width)


def _turn(path: Path, frame: Any) -> _Turn:
    """Read a frame's display matrix, which maps x and y of a decoded pixel."""
    # `frame.side_data` would keep the frame and its side data in a circle, until the garbage collector runs.
    try:
        found = av.sidedata.sidedata.SideDataContainer(frame)  # type: ignore[attr-defined]
    except ValueError as error:
        raise VideoError(path, f"has side data that PyAV cannot read ({error})") from None
    matrix = found.get("DISPLAYMATRIX")
    if matrix is None:
        return _Turn()
    # Rows (a, b, u), (c, d, v), (x, y, w), in fixed point: a pixel is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    kept, other = ((c, b), (a, d)) if transposed else ((a, d), (b, c))
    if max(map(abs, other)) > SKEW * min(map(abs, kept)):
        raise VideoError(path, "has a display rotation that is not a multiple of 90 degrees")
    return _Turn(transposed, upside_down=kept[1] < 0, mirrored=kept[0] < 0)


def _below(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """Return a size of at most `max_pixels` pixels, with the aspect ratio kept up to rounding."""
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width))
    h = max(1, min(max_pixels, math.floor(height * scale)))
    return h, max(1, min(math.floor(width * scale), max_pixels // h))


class _Choice(NamedTuple):
    """Which frames of a clip are kept.

    indices: ascending; repeated if a clip is too short. start, stop: the first frame of the segment, and the
    first after it. duration: seconds of the segment.
    """

    indices: np.ndarray
    start: int
    stop: int
    duration: float


def _choose(
    timeline: Timeline,
    num_frames: int | None,
    fps: float | None,
    max_frames: int | None,
    start: float | None,
    end: float | None,
) -> _Choice:
    since = timeline.times - timeline.times[0]
    lower = int(np.searchsorted(since, (start or 0.0) - TIE))
    upper = int(np.searchsorted(since, end + TIE, side="right")) if end is not None else len(since)
    times = since[lower:upper]
    if not len(times):
        return _Choice(np.empty(0, np.int64), lower, upper, 0.0)
    duration = float((since[upper] if upper < len(since) else timeline.duration) - times[0])
    wanted = _wanted_times(times, duration, num_frames, fps, max_frames)
    right = np.searchsorted(times, wanted).clip(min(1, len(times) - 1), len(times) - 1)
    left = np.maximum(right - 1, 0)
    earlier = wanted - times[left] <= times[right] - wanted + TIE
    return _Choice(lower + np.where(earlier, left, right), lower, upper, duration)


def _wanted_times(
    times: np.ndarray, duration: float, num_frames: int | None, fps: float | None, max_frames: int | None
) -> np.ndarray:
    first, last, held = times[0], times[-1], len(times)
    if num_frames is not None:
        count = min(num_frames, max_frames or num_frames)
    else:
        count = most = min(held, max_frames or held)
        by_rate = max(1, math.floor(duration * fps + 1e-6)) if fps is not None else held
        if by_rate <= most:
            return times if fps is None else np.minimum(first + np.arange(by_rate) / fps, last)
    return np.array([(first + last) / 2]) if count == 1 else np.linspace(first, last, count)


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        whole = name not in ("fps", "start", "end")
        if value is None or (name == "start" and value == 0):
            continue
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value!r}")


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
    """Decode frames of a clip, sampled over its time, and keep only the requested frames.

    The timeline consists of the decodable frames in display order. Where their time stamps do not increase,
    the order decides. For each requested time the nearest frame is kept; of two equally near frames, the
    earlier one. The file's display matrix (rotation, mirroring) is applied.

    Args:
        path: a file of a supported container format (``motionenhancer.data.decode.FORMATS``). A :class:`Clip`
            gives its segment, unless start or end is given.
        num_frames: exactly this many, evenly spaced from the first to the last; a shorter clip repeats
            frames.
        fps: frames per second from the first frame on, never more than the clip has.
        max_frames: with fps or alone: if there are more frames, this many, evenly spaced from first to last.
        max_pixels: shrink frames to at most this many pixels and keep the aspect ratio.
        size: (height, width) in pixels to resize to.
        min_frames: refuse a clip with fewer frames; 2 refuses stills.
        start, end: read only frames with ``start <= time <= end``, in seconds since the clip's first frame,
            as qwen-vl-utils does. Frames are sampled only from these.

    Without num_frames, fps and max_frames all frames are returned. A clip is refused if its frames have more
    pixels than ``MOTIONENHANCER_FRAME_PIXELS``, or take more bytes than ``MOTIONENHANCER_CLIP_BYTES``, or if
    it has more than ``MOTIONENHANCER_CLIP_FRAMES``.

    Returns:
        Video: timestamps count from the clip's first frame, also for a segment.

    Raises:
        VideoError: the file is missing, empty, not a video, truncated, damaged, too short or too large, or
            has no video stream or no frames.
        ValueError, TypeError: an argument is out of range, or two arguments exclude each other.

    >>> import tempfile
    >>> from motionenhancer.data.encode import encode_video
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     encode_video(f"{folder}/a.mp4", np.zeros((8, 16, 32, 3), np.uint8), fps=8)
    ...     video = read_frames(f"{folder}/a.mp4", num_frames=3)
    >>> video.frames.shape, video.timestamps.tolist(), video.duration
    ((3, 16, 32, 3), [0.0, 0.375, 0.875], 1.0)
    """
    if size is not None and not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise TypeError(f"size must be (height, width), got {size!r}")
    sides = {f"size[{i}]": side for i, side in enumerate(size or ())}
    _check_numbers(num_frames=num_frames, max_frames=max_frames, min_frames=min_frames, fps=fps)
    _check_numbers(start=start, end=end, max_pixels=max_pixels, **sides)
    if end is not None and end <= (start or 0):
        raise ValueError(f"end must be after start, got start {start!r} and end {end!r}")
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames and fps exclude each other, got {num_frames} and {fps}")
    if size is not None and max_pixels is not None:
        raise ValueError(f"size and max_pixels exclude each other, got {size} and {max_pixels}")
    if isinstance(path, Clip) and start is None and end is None:
        start, end = path.start, path.end
    path = Path(path)
    _refuse_bytes(path, num_frames or 0, _LEAST)
    for timeline in timelines(path):
        choice = _choose(timeline, num_frames, fps, max_frames, start, end)
        video = _pick(path, timeline, choice, size, max_pixels)
        if video is not None:
            break
    else:
        if len(choice.indices):
            raise VideoError(path, "decodes to different frames each time")
        until = f" until {end:g} s" if end is not None else ""
        lasts = f"it lasts {timeline.duration:.3g} s"
        raise VideoError(path, f"has no frames from {start or 0:g} s on{until}; {lasts}")
    if (held := video.source_frames) < min_frames:
        raise VideoError(path, f"has {held} frame{'s' if held > 1 else ''}, needs at least {min_frames}")
    return video


def _refuse_bytes(path: Path, frames: int, pixels: int) -> None:
    """Refuse a clip by its numbers of frames and pixels before memory is allocated; see `refuse_size`."""
    size = 3 * frames * pixels
    refuse_size(path, size, f"{frames:,} frames of {pixels:,} pixels take {size:,} bytes", BYTES)


def _pick(
    path: Path,
    timeline: Timeline,
    choice: _Choice,
    size: tuple[int, int] | None,
    max_pixels: int | None,
) -> Video | None:
    """Decode a clip and convert the chosen frames; None if there are none or not the timeline's."""
    chosen, stop = choice.indices, choice.stop
    if not len(chosen):
        return None
    progress = Progress()
    # One converter a clip, with one thread: setting one up takes longer than converting a small frame.
    converter = av.video.reformatter.VideoReformatter()
    pictures = np.empty((0, 0, 0, 3), np.uint8)
    needed = set(chosen.tolist())
    frames = decode(path, progress)
    try:
        for index, frame in enumerate(frames):
            if index >= len(timeline.stamps) or frame.pts != timeline.stamps[index]:
                return None
            if index == stop:
                break
            if index in needed:
                turn = _turn(path, frame)
                if not len(pictures):
                    size = size or _below(*turn.shown(frame.height, frame.width), max_pixels)
                    _refuse_bytes(path, len(chosen), size[0] * size[1])
                    pictures = np.empty((len(chosen), *size, 3), np.uint8)
                first, behind = np.searchsorted(chosen, [index, index + 1])
                pictures[first:behind] = _to_array(converter, frame, turn, pictures.shape[1:])
    except VideoError:
        raise
    except (av.error.FFmpegError, MemoryError, ValueError) as error:
        raise unreadable(path, error, "a decoded frame cannot be converted") from None
    finally:
        frames.close()  # type: ignore[attr-defined]
    if progress.decoded != min(stop + 1, len(timeline.stamps)):
        return None
    judge(path, progress, timeline.whole or stop < len(timeline.stamps))
    return Video(
        frames=pictures,
        timestamps=timeline.times[chosen] - timeline.times[0],
        fps=timeline.fps,
        duration=choice.duration,
        decoded=progress.decoded,
        source_frames=stop - choice.start,
        errors=progress.errors,
    )


def _to_array(converter: Any, frame: Any, turn: _Turn, shape: tuple[int, ...]) -> np.ndarray:
    height, width = turn.shown(*shape[:2])
    converted = converter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="BICUBIC", threads=1
    )
    picture = converted.to_ndarray()
    if turn.transposed:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if turn.upside_down else 1, :: -1 if turn.mirrored else 1]


def check_video(path: str | Path) -> VideoInfo:
    """Decode a whole clip and return its content as numbers. No frame is kept.

    Raises:
        VideoError: as :func:`read_frames`.
    """
    path, progress = Path(path), Progress()
    timeline = measure(path, foretell(path)[1], progress)
    frame = next(decode(path, Progress()))
    shape = _turn(path, frame).shown(frame.height, frame.width)
    return VideoInfo(progress.decoded, *shape, timeline.fps, timeline.duration, progress.errors)


def outline(
    path: str | Path | Clip,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> Video:
    """Estimate the result of :func:`read_frames` from the file's header alone; all pixels are 0.

    The number and the size of the frames are those of the header, which may be wrong; no rotation is applied.

    Args:
        path, num_frames, fps, max_frames: as for :func:`read_frames`, not checked.

    Raises:
        VideoError: the file cannot be opened.
    """
    with opened(Path(path)) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        seconds = (container.duration or 0) / av.time_base
        count = int(stream.frames or min(max(seconds * rate, 1), limit(FRAMES)))
        size = stream.height, stream.width
    times = np.arange(count) / rate
    timeline = Timeline([], times, count / rate, rate, False)
    start, end = (path.start, path.end) if isinstance(path, Clip) else (None, None)
    choice = _choose(timeline, num_frames, fps, max_frames, start, end)
    return Video(
        frames=np.broadcast_to(np.uint8(0), (len(choice.indices), *size, 3)),  # takes no memory
        timestamps=times[choice.indices],
        fps=rate,
        duration=choice.duration,
        decoded=0,
        source_frames=choice.stop - choice.start,
    )


def content_digest(path: str | Path | Clip) -> str:
    """Return the sha256 of a file's bytes in hex; it does not depend on the file's name. Read in pieces.

    Raises:
        VideoError: the file does not exist or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(Path(path), error) from None
