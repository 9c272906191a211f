"""The display time of each frame of a clip, predicted from packets or measured on decoded frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .decode import (
    FRAMES,
    PIXELS,
    Progress,
    VideoError,
    av,
    decode,
    is_passing,
    limit,
    opened,
    refuse_size,
    say,
    unreadable,
)
from .truncation import missing_share

MISSING_SHARE = 0.05
"""A clip is refused when more than this share of it is missing or fails to decode."""

_HELD = 4
"""Number of frames that a decoder may still return after a packet that fails to decode."""

_REORDERED = 16
"""A codec reorders at most this many frames. A time stamp that falls by more starts a joined clip."""


@dataclass(frozen=True)
class Timeline:
    """The frames of a clip in display order.

    Attributes:
        stamps: time stamp of each frame in the stream's time base; None for a frame without a time stamp.
        times: (n,) float64, strictly increasing, seconds. Equal to the time stamps where these increase;
            elsewhere the order of the frames decides.
        duration: seconds from the first frame to the end of the last.
        fps: mean frame rate.
        whole: whether the file's own bytes prove that it is not cut off.
    """

    stamps: list[int | None]
    times: np.ndarray
    duration: float
    fps: float
    whole: bool


def timelines(path: Path) -> Iterator[Timeline]:
    """Yield the timeline predicted from a clip's packets, if any, then the timeline of the decoded frames.

    Raises:
        VideoError: as :func:`foretell` and :func:`measure`.
    """
    foretold, whole = foretell(path)
    if foretold is not None:
        yield foretold
    yield measure(path, whole, Progress())


def _clock(stream: Any) -> tuple[float, float]:
    """Seconds per unit of a stream's time stamps, and its frames per second; 0 if unknown."""
    return float(stream.time_base or 0), float(stream.average_rate or stream.guessed_rate or 0)


def foretell(path: Path) -> tuple[Timeline | None, bool]:
    """Read all packets of a clip without decoding any.

    Returns:
        The timeline if every packet has its own time stamp, else None; and whether the file's bytes prove
        that it is not truncated. The timeline is a prediction: a decoder may return fewer frames (leading
        pictures without their reference, packets without a picture) or other time stamps.

    Raises:
        VideoError: the file cannot be opened, has no packets, is damaged between packets, or is truncated.
    """
    stamps: list[int | None] = []
    most = limit(FRAMES)
    cut: dict[int, bool] = {}
    last_length, problem = 0, ""
    with opened(path) as (container, stream):
        try:
            for packet in container.demux():
                if packet.dts is None and packet.pts is None and packet.size == 0:
                    continue
                cut[packet.stream_index] = packet.is_corrupt
                if packet.stream_index == stream.index and not packet.is_discard:
                    stamps.append(packet.pts)
                    if len(stamps) > most:  # Not every format says how many it holds.
                        refuse_size(path, len(stamps), f"holds {len(stamps):,} frames", FRAMES)
                    last_length = packet.duration or last_length
        except (av.error.FFmpegError, OSError) as error:
            if is_passing(error):
                raise unreadable(path, error) from None
            problem = f" ({say(error)})"
        try:
            missing = missing_share(path, stream)
        except OSError as error:
            raise unreadable(path, error) from None
        clock = _clock(stream)
    count, whole = len(stamps), missing is not None
    if missing is None and any(cut.values()):
        missing = 1.0
    if missing is not None and missing > MISSING_SHARE:
        raise VideoError(path, _cut_reason(missing, count))
    if not count:
        raise VideoError(path, f"has no frames{problem}")
    if problem:
        raise VideoError(path, f"damaged after {count} frames{problem}")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if len(set(known)) < count or not clock[0]:
        return None, whole
    return _timeline(list(known), known, last_length, clock, whole), whole


def _cut_reason(missing: float, count: int) -> str:
    if missing < 1:
        return f"truncated: {missing:.0%} of it lies beyond the end of the file, which holds {count} frames"
    return (
        f"truncated: the file ends in the middle of its data, after {count} frames "
        "(to use what is there: ffmpeg -i FILE -c copy NEW_FILE)"
    )


def measure(path: Path, whole: bool, progress: Progress) -> Timeline:
    """Decode a clip and return the timeline of the decoded frames. No frame is kept.

    Args:
        whole: result of :func:`foretell`.
        progress: counts the frames and errors.

    Raises:
        VideoError: as :func:`judge`.
    """
    pts: list[int | None] = []
    dts: list[int | None] = []
    length = 0
    with opened(path) as (_, stream):
        clock = _clock(stream)
    for frame in decode(path, progress):
        pts.append(frame.pts)
        dts.append(frame.dts)
        length = frame.duration or length
    judge(path, progress, whole)
    return _timeline(pts, _increasing(pts, dts, *clock), length, clock, whole)


def _timeline(
    stamps: list[int | None], shown: Any, last_length: int, clock: tuple[float, float], whole: bool
) -> Timeline:
    base, rate = clock
    times = np.asarray(shown, np.float64) * (base or 1.0)
    gap = float(np.median(np.diff(times))) if len(times) > 1 else (1.0 / rate if rate else 0.0)
    # A last packet may carry a nonsense duration: the last frame lasts no longer than all before it.
    length = min(last_length * base, float(times[-1] - times[0]) + gap) if last_length and base else gap
    duration = float(times[-1] - times[0]) + length
    return Timeline(stamps, times, duration, len(times) / duration if duration > 0 else rate, whole)


def _increasing(pts: list[int | None], dts: list[int | None], base: float, rate: float) -> np.ndarray:
    """A strictly increasing stamp for each frame, in units of the time base, or in seconds without one."""
    step = 1.0 / (rate or 25.0) / (base or 1.0)
    if not base:
        return np.arange(len(pts)) * step
    shown = _filled(pts, step)
    if None not in pts and (np.diff(shown) > 0).all():
        return shown
    # Packets in decoding order: AVI with B-frames, MP4 without composition offsets.
    decoded = _filled(dts, step)
    if sum(stamp is not None for stamp in dts) * 2 > len(dts) and (np.diff(decoded) > 0).all():
        return decoded
    return _spread(np.sort(_joined(shown, step)), step)


def _filled(stamps: list[int | None], step: float) -> np.ndarray:
    """Give frames without a time stamp one between their neighbours, or ``step`` beyond the first or last."""
    index = np.array([i for i, stamp in enumerate(stamps) if stamp is not None], np.int64)
    places = np.arange(len(stamps), dtype=np.float64)
    if not len(index):
        return places * step
    values = np.array([stamps[i] for i in index], np.float64)
    step = _usual(values, step)
    filled = np.interp(places, index, values)
    filled -= np.maximum(0, index[0] - places) * step
    filled += np.maximum(0, places - index[-1]) * step
    return filled


def _usual(stamps: np.ndarray, step: float) -> float:
    """The median of the positive steps between time stamps; ``step`` if there are none."""
    steps = np.diff(stamps)
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else step


def _joined(stamps: np.ndarray, step: float) -> np.ndarray:
    """Let each clip of a joined file start at the end of the previous clip."""
    step = _usual(stamps, step)
    result, offset, latest = stamps.copy(), 0.0, stamps[0]
    for i in range(1, len(stamps)):
        if stamps[i] + offset < latest - _REORDERED * step:
            offset = latest + step - stamps[i]
        result[i] = stamps[i] + offset
        latest = max(latest, result[i])
    return result


def _spread(stamps: np.ndarray, step: float) -> np.ndarray:
    """Spread frames with the same time stamp evenly up to the next time stamp."""
    values, index, counts = np.unique(stamps, return_inverse=True, return_counts=True)
    steps = np.append(np.diff(values), np.median(np.diff(values)) if len(values) > 1 else step * counts[-1])
    within = np.arange(len(stamps)) - (np.cumsum(counts) - counts)[index]
    return values[index] + within * (steps / counts)[index]


def judge(path: Path, progress: Progress, whole: bool) -> None:
    """Refuse a clip if too much of it failed to decode.

    Args:
        progress: progress of a decoder that reached the end.
        whole: whether the file's bytes prove that it is not truncated. Without proof, damaged last frames
            count as truncation.

    Raises:
        VideoError: no frame was decoded, more than ``MISSING_SHARE`` failed, or the last frames are damaged.
    """
    decoded, errors, first = progress.decoded, progress.errors, progress.first_error
    if decoded == 0:
        why = f"none of its frames can be decoded{f' ({first})' if first else ''}"
        raise VideoError(path, why, passing=PIXELS in first)
    packets = decoded + errors
    if errors > MISSING_SHARE * packets:
        raise VideoError(path, f"damaged: {errors} of {packets} packets fail to decode, first at {first}")
    if not whole and max([progress.last_error, *progress.corrupt]) >= max(0, decoded - _HELD):
        raise VideoError(path, _cut_reason(1, decoded))
