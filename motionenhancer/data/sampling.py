"""Which frames of a video a student sees, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

from .clip import Clip
from .video import Video, read_frames


@dataclass(frozen=True)
class Frames:
    """How a run shows its clips.

    num_frames: number of evenly spaced frames; replaces the rate.
    fps: frames per second.
    min_frames, max_frames: limits of the number of frames at a rate. A clip with fewer frames than the
        minimum gives all of them.
    max_pixels: maximum pixels of a frame as the model sees it; None keeps the processor's own limit.

    Raises:
        ValueError: a number is not finite or not above 0.
    """

    num_frames: int | None = None
    fps: float = 1.0
    min_frames: int = 1
    max_frames: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        counts = (self.num_frames, self.min_frames, self.max_frames, self.max_pixels)
        if not all(count is None or count >= 1 for count in counts) or not 0 < self.fps < inf:
            raise ValueError(f"every number must be finite and above 0, got {self}")

    def of(self, video: Path | Clip, read: Callable[..., Video] = read_frames) -> Video:
        """Decode the frames of a video to show. The keys of its row (see `Clip`) override the run's values.

        Args:
            video: the file or clip.
            read: `read_frames`; or `outline`, which decodes nothing.

        Raises:
            VideoError: the video cannot be read.
        """
        num_frames, fps = self.num_frames, self.fps
        least, most = self.min_frames, self.max_frames
        if isinstance(video, Clip):
            least, most = video.min_frames or least, video.max_frames or most
            own = video.num_frames
            if video.fps is not None:
                num_frames, fps = None, video.fps
            elif own is None and num_frames is not None:
                own = min(max(num_frames, video.min_frames or 1), video.max_frames or num_frames)
            if own is not None and own != num_frames:
                # No frame is repeated: a row must not make an endless video of a short clip.
                return read(video, max_frames=own)
        if num_frames is not None:
            return read(video, num_frames=num_frames)
        shown = read(video, fps=fps, max_frames=most)
        wanted = min(least, most or least, shown.source_frames)
        return shown if len(shown.frames) >= wanted else read(video, num_frames=wanted)
