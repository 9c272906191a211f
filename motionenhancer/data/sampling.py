"""The frames of a video that a student is shown, in training and in evaluation alike."""

from __future__ import annotations

from pathlib import Path

from motionenhancer.data.clip import Clip
from motionenhancer.data.video import Video, read_frames


def sample_frames(
    video: Path | Clip,
    *,
    num_frames: int | None = None,
    fps: float = 1.0,
    min_frames: int = 1,
    max_frames: int | None = None,
) -> Video:
    """Decode the frames of a video that a student is shown.

    What the video's row says (see `Clip`) takes the place of the arguments, which are the run's.

    Args:
        video: the file, and what its row says of it.
        num_frames: so many, evenly; takes the place of the rate.
        fps: frames a second.
        min_frames, max_frames: fewest, as far as the video holds them, and most frames by rate.

    Raises:
        VideoError: it cannot be read.
    """
    if isinstance(video, Clip):
        min_frames, max_frames = video.min_frames or min_frames, video.max_frames or max_frames
        if video.num_frames is not None:
            num_frames = video.num_frames
        elif video.fps is not None:
            num_frames, fps = None, video.fps
        elif num_frames is not None:
            num_frames = min(max(num_frames, video.min_frames or 1), video.max_frames or num_frames)
    if num_frames is not None:
        return read_frames(video, num_frames=num_frames)
    shown = read_frames(video, fps=fps, max_frames=max_frames)
    wanted = min(min_frames, max_frames or min_frames, shown.source_frames)
    return shown if len(shown.frames) >= wanted else read_frames(video, num_frames=wanted)
