"""Training data: samples from json files, frames from video files, and counts of skipped samples."""

from motionenhancer.data.clip import Clip
from motionenhancer.data.readers import read_samples
from motionenhancer.data.sample import Sample, prompt_text
from motionenhancer.data.skips import Skip, SkipLog
from motionenhancer.data.video import (
    Video,
    VideoError,
    VideoInfo,
    check_video,
    content_digest,
    read_frames,
)

__all__ = [
    "Clip",
    "Sample",
    "Skip",
    "SkipLog",
    "Video",
    "VideoError",
    "VideoInfo",
    "check_video",
    "content_digest",
    "prompt_text",
    "read_frames",
    "read_samples",
]
