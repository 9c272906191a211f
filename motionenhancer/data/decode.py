"""Opening, timing and decoding a video file as a stream, with every way it can fail named."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import av
except ImportError:  # Only reading a clip needs it.
    av = None  # type: ignore[assignment]

__all__ = ["Progress", "Timeline", "VideoError", "decode", "is_passing", "judge", "opened", "say", "scan"]

MISSING_SHARE = 0.05
"""A clip is refused when more than this share of its frames cannot be decoded."""


#: Errors of a machine, which say nothing about the file that was to be read. ffmpeg means the file by EIO
#: and ENOMEM.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EACCES}


class VideoError(ValueError):
    """A video that cannot be used: ``path`` and ``reason``. Survives pickling, so it may cross processes.

    ``passing``: for all that is known the file is good, and the machine could not read it just now.
    """

    def __init__(self, path: str | Path, reason: str, passing: bool = False) -> None:
        super().__init__(str(path), reason, passing)
        self.path, self.reason, self.passing = Path(path), reason, passing

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Timeline:
    """Times of the frames in seconds, ascending; ``timed`` says whether the file itself carries them."""

    times: np.ndarray
    duration: float
    fps: float
    timed: bool


@dataclass
class Progress:
    """What a decoder has done so far."""

    decoded: int = 0
    errors: int = 0
    first_error: str = ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and its first real video stream, or raise :class:`VideoError` with the reason."""
    try:
        if not path.exists():
            raise VideoError(path, "does not exist")
        if not path.is_file():
            raise VideoError(path, "is not a file")
        if path.stat().st_size == 0:
            raise VideoError(path, "is empty (0 bytes)")
    except OSError as error:
        raise VideoError(path, f"cannot be read ({say(error)})", is_passing(error)) from None
    if av is None:
        raise VideoError(path, "cannot be read: PyAV is not installed (pip install av)", passing=True)
    try:
        # A playlist disguised as a clip must not make the demuxer fetch anything.
        container = av.open(
            str(path), mode="r", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = f"cannot be opened, damaged or not a video ({say(error)})"
        raise VideoError(path, reason, is_passing(error)) from None
    try:
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            raise VideoError(path, "has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(path, "no decoder for its video stream")
        yield container, stream
    finally:
        container.close()


def _is_cover(stream: Any) -> bool:
    return bool(int(stream.disposition) & int(av.stream.Disposition.attached_pic))


def say(error: BaseException) -> str:
    """Return the shortest useful text of an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_passing(error: BaseException) -> bool:
    """Whether an error is the machine's alone: no memory, too many open files, a share out of reach."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING


def scan(path: Path) -> Timeline:
    """Read all packets without decoding any: the exact times of the frames, whatever the header claims."""
    pts: list[int] = []
    dts: list[int] = []
    count = discarded = 0
    last_length, end, problem = 0, 0.0, ""
    with opened(path) as (container, stream):
        base = stream.time_base
        try:
            for packet in container.demux():
                if packet.dts is None and packet.pts is None and packet.size == 0:
                    continue
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None and packet.time_base:
                    end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index:
                    continue
                if packet.is_discard:
                    discarded += 1
                    continue
                count += 1
                if packet.pts is not None:
                    pts.append(packet.pts)
                if packet.dts is not None:
                    dts.append(packet.dts)
                last_length = packet.duration or last_length
        except (av.error.FFmpegError, OSError) as error:
            problem = f" ({say(error)})"
        claimed = max(0, stream.frames - discarded)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        matroska = container.format.name.startswith("matroska")
        header = (container.duration or 0) / 1e6 if matroska else 0.0
    if count < claimed * (1 - MISSING_SHARE):
        raise VideoError(path, f"truncated: its header says {claimed} frames, it holds {count}{problem}")
    if not count:
        raise VideoError(path, f"has no frames{problem}")
    if problem:
        raise VideoError(path, f"damaged after {count} frames{problem}")
    if end < header * (1 - MISSING_SHARE) - 0.5:
        raise VideoError(path, f"truncated: its header says {header:.1f} s, it ends at {end:.1f} s")

    timed = len(pts) == count and base is not None
    if timed:
        stamps = np.unique(np.array(pts, dtype=np.int64))
        times = stamps.astype(np.float64) * float(base)
        gap = float(np.median(np.diff(times))) if len(times) > 1 else (1.0 / rate if rate else 0.0)
        # A last packet may carry a nonsense duration; nothing is shown for longer than it took so far.
        length = min(last_length * float(base), float(times[-1] - times[0]) + gap) if last_length else gap
    else:
        times = np.arange(count) / (rate or 25.0)
        length = 1.0 / (rate or 25.0)
    duration = float(times[-1] - times[0]) + length
    return Timeline(times, duration, count / duration if duration > 0 else rate, timed)


def decode(path: Path, timeline: Timeline, progress: Progress) -> Iterator[tuple[float, Any]]:
    """Yield (time in the timeline's seconds, frame) in order of presentation, counting into ``progress``."""
    with opened(path) as (container, stream):
        stream.codec_context.thread_count = 1
        base = float(stream.time_base or 0)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except (av.error.FFmpegError, OSError) as error:
                progress.errors += 1
                progress.first_error = progress.first_error or f"frame {progress.decoded}: {say(error)}"
                if progress.errors > len(timeline.times) + 8:
                    return
                continue
            if packet is None:
                return
            for frame in frames:
                index = min(progress.decoded, len(timeline.times) - 1)
                progress.decoded += 1
                timed = timeline.timed and frame.pts is not None
                yield (frame.pts * base if timed else float(timeline.times[index])), frame


def judge(path: Path, timeline: Timeline, progress: Progress, *, complete: bool) -> None:
    """Raise :class:`VideoError` if too much failed; ``complete``: the decoder reached the end of the file."""
    expected = len(timeline.times)
    if complete and progress.decoded == 0:
        why = f" ({progress.first_error})" if progress.first_error else ""
        raise VideoError(path, f"none of its {expected} frames can be decoded{why}")
    lost = expected - progress.decoded if complete else progress.errors
    if max(lost, progress.errors) > MISSING_SHARE * expected:
        why = f", {progress.errors} decode errors, first at {progress.first_error}" if progress.errors else ""
        raise VideoError(path, f"truncated or damaged: {progress.decoded} of {expected} frames decode{why}")
