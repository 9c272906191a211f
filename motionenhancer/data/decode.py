"""Open a video file and decode it as a stream. Every failure is named."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import av
except ImportError:  # Only needed to read a clip.
    av = None  # type: ignore[assignment]

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,asf_o,ogg,nut,mxf,gxf,"
    "wtv,rm,dv,nsv,ivf,obu,av1,h261,h263,h264,hevc,vvc,m4v,mjpeg,yuv4mpegpipe,vc1,vc1test,dirac,cavsvideo,amv,"
    "gif,apng,gif_pipe,jpeg_pipe,png_pipe,webp_pipe,webp,bmp_pipe,tiff_pipe"
)
"""The demuxers that may open a clip. Each reads one file: no playlist, image sequence or device."""

PIXELS, BYTES = "MOTIONENHANCER_FRAME_PIXELS", "MOTIONENHANCER_CLIP_BYTES"
FRAMES = "MOTIONENHANCER_CLIP_FRAMES"
"""Names of the environment variables that limit decoding; see :func:`limit`."""

_LIMITS = {PIXELS: 2**26, BYTES: 2**33, FRAMES: 2 * 10**6}

#: Errors of a machine, which say nothing about the file that was to be read. ffmpeg means the file by EIO
#: and ENOMEM.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EACCES}


class VideoError(ValueError):
    """A video that cannot be used: ``path`` and ``reason``. It can be pickled, so it may cross processes.

    ``passing``: the machine could not read the file at this time, and the file itself may be good.
    """

    def __init__(self, path: str | Path, reason: str, passing: bool = False) -> None:
        super().__init__(str(path), reason, passing)
        self.path, self.reason, self.passing = Path(path), reason, passing

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def limit(name: str) -> int:
    """Return a decoding limit of this machine: pixels of a frame (``PIXELS``), bytes or frames of a clip.

    A file of 300 bytes can hold a picture that fills the memory, so the picture's size is checked.

    Raises:
        ValueError: the variable is not a whole number above 0.
    """
    value = os.environ.get(name) or str(_LIMITS[name])
    if not (value.isascii() and value.isdecimal() and int(value)):
        raise ValueError(f"the environment variable {name} must be a whole number above 0, got {value!r}")
    return int(value)


def refuse_size(path: Path, size: int, what: str, name: str) -> None:
    """Refuse a clip that is too large for this machine. No record is kept, as other machines may read it.

    Raises:
        VideoError: ``size`` is above the limit.
    """
    if size > (most := limit(name)):
        said = f"{what}, more than {most:,}; the environment variable {name} sets the limit"
        raise VideoError(path, said, passing=True)


@dataclass
class Progress:
    """The progress of a decoder.

    Attributes:
        decoded: number of decoded frames.
        errors: number of packets that failed to decode.
        first_error: message of the first failure.
        last_error: number of frames decoded before the last failure; -1 if there was none.
        corrupt: indices of frames that the decoder marks as damaged.
    """

    decoded: int = 0
    errors: int = 0
    first_error: str = ""
    last_error: int = -1
    corrupt: list[int] = field(default_factory=list)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and its best video stream.

    Args:
        path: a regular file. Its name is taken literally: a colon or percent sign has no special meaning.

    Yields:
        PyAV's container and video stream. The stream is libav's first choice, never a cover picture.

    Raises:
        VideoError: the file is missing or empty, its format is not in ``FORMATS``, it has no video stream, or
            its frames have more pixels than the ``limit``.
    """
    # ffmpeg itself refuses larger frames, also where the header gives no size. It counts padded lines.
    largest = {"max_pixels": str(2 * limit(PIXELS) + 2**20)}
    try:
        if not path.exists():
            raise VideoError(path, "does not exist")
        if not path.is_file():
            raise VideoError(path, "is not a file")
        size = path.stat().st_size
        if size == 0:
            raise VideoError(path, "is empty (0 bytes)")
    except OSError as error:
        raise unreadable(path, error) from None
    if av is None:
        raise VideoError(path, "cannot be read: PyAV is not installed (pip install av)", passing=True)
    try:
        # "file:" keeps libav from reading the name as a protocol ("00:12.mp4") or as an option ("-a.mp4").
        container = av.open(
            f"file:{path}",
            mode="r",
            options={"protocol_whitelist": "file", "format_whitelist": FORMATS, **largest},
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise unreadable(path, error, "cannot be opened: damaged, or not a video") from None
    try:
        stream = _best_stream(container)
        if stream is None:
            raise VideoError(path, "has no video stream")
        if stream.codec_context is None:
            raise VideoError(path, "no decoder for its video stream")
        _refuse_frame(path, stream)
        if stream.frames > size:
            # To list them all could take hours.
            raise VideoError(path, f"damaged: its header lists {stream.frames:,} frames in {size:,} bytes")
        refuse_size(path, stream.frames, f"its header lists {stream.frames:,} frames", FRAMES)
        stream.codec_context.options = largest
        # A DataLoader already has a process a core; a converter and a decoder take one thread each.
        stream.codec_context.thread_count = 1
        yield container, stream
    finally:
        container.close()


def _refuse_frame(path: Path, shown: Any) -> None:
    pixels = shown.width * shown.height
    refuse_size(path, pixels, f"its frames have {shown.width}×{shown.height} pixels", PIXELS)


def _best_stream(container: Any) -> Any | None:
    covers = int(av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails)
    films = [s for s in container.streams.video if not int(s.disposition) & covers]
    best = container.streams.best("video")
    if best is None or best in films or not films:
        return best if films else None
    # libav ranked a cover first. Among the others: the default stream, then the largest picture.
    default = int(av.stream.Disposition.default)
    return max(films, key=lambda s: (int(s.disposition) & default, s.width * s.height))


def unreadable(path: str | Path, error: BaseException, what: str = "cannot be read") -> VideoError:
    """Return the error to raise for a file that could not be read."""
    return VideoError(path, f"{what} ({say(error)})", is_passing(error))


def say(error: BaseException) -> str:
    """Return the shortest useful text of an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_passing(error: BaseException) -> bool:
    """Whether the machine caused an error, not the file: lack of memory or open files, a lost network."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING


def decode(path: Path, progress: Progress) -> Iterator[Any]:
    """Yield the frames of a clip in display order; count them in ``progress``.

    A packet that fails to decode is counted and skipped.
    """
    with opened(path) as (container, stream):
        packets = container.demux(stream)
        fruitless = 0
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except (av.error.FFmpegError, OSError) as error:
                if is_passing(error):
                    raise unreadable(path, error) from None
                progress.errors += 1
                progress.last_error = progress.decoded
                # A frame that ffmpeg refused as too large has no size here.
                large = f"; or it has more than {limit(PIXELS):,} pixels, see {PIXELS}"
                said = f"frame {progress.decoded}: {say(error)}{'' if stream.width else large}"
                progress.first_error = progress.first_error or said
                fruitless += 1
                if fruitless > 1000:  # A demuxer that fails forever.
                    return
                continue
            if packet is None:
                return
            for frame in frames:
                _refuse_frame(path, frame)
                fruitless = 0
                if frame.is_corrupt:
                    progress.corrupt.append(progress.decoded)
                progress.decoded += 1
                yield frame
