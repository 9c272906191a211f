"""Convert a clip to the frame count and the size that a teacher takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def nearest_valid_count(count: int, stride: int, offset: int) -> int:
    """The value of `stride·m + offset`, m ≥ 0, nearest to `count`; of two equally near, the larger.

    Example:
        >>> nearest_valid_count(48, 4, 1), nearest_valid_count(81, 8, 5)
        (49, 85)
    """
    return max(0, (2 * (count - offset) + stride) // (2 * stride)) * stride + offset


def resample_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """Pick `count` evenly spaced frames of (n, h, w, 3) uint8 frames; repeat frames if there are fewer.

    Raises:
        TypeError, ValueError: frames have another shape or dtype, or there are fewer than two.
    """
    if not isinstance(frames, np.ndarray):
        raise TypeError(f"frames must be a numpy array (n, h, w, 3) uint8, got {type(frames).__name__}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be (n, h, w, 3) uint8, got {frames.shape} {frames.dtype}")
    if len(frames) < 2:
        raise ValueError(f"frames must hold at least 2 frames, as motion needs two, got {len(frames)}")
    return frames if len(frames) == count else frames[_evenly(len(frames), count)]


def _evenly(given: int, count: int) -> np.ndarray:
    return np.round(np.linspace(0, given - 1, count)).astype(np.int64)


def grid_times(times: Sequence[float] | np.ndarray, used: int, grid_frames: int, stride: int) -> list[float]:
    """Return the time of each frame of a teacher's grid: the mean time of its video frames.

    The first frame of a grid covers the video frames that the later ones do not cover, mostly only the first.

    Args:
        times: (n,) times in seconds of the video frames that the teacher received.
        used: number of video frames after `resample_frames`.
        grid_frames: F, number of frames of the grid.
        stride: number of video frames that each frame of the grid covers, except the first.

    Example:
        >>> grid_times([0.0, 0.5, 1.0, 1.5, 2.0], 5, 2, 4)
        [0.0, 1.25]
    """
    chosen = np.asarray(times, np.float64)[_evenly(len(times), used)]
    ends = [used - stride * (grid_frames - 1 - frame) for frame in range(grid_frames)]
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [float(chosen[max(0, start) : max(1, end)].mean()) for start, end in spans]


def to_pixels(frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (n, h, w, 3) → float32 (1, 3, n, height, width) in [-1, 1], resized with antialiasing."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    if tuple(video.shape[-2:]) != tuple(size):
        video = F.interpolate(video, size=size, mode="bilinear", antialias=True, align_corners=False)
        video = video.clamp(0, 255)
    return (video / 127.5 - 1.0).permute(1, 0, 2, 3).unsqueeze(0)
