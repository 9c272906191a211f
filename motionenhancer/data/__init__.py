"""Training data: samples from json files, frames from video files, and counts of skipped samples."""

from .clip import Clip
from .readers import read_samples
from .sample import Sample, prompt_text
from .skips import Skip, SkipLog
from .video import Video, VideoError, VideoInfo, check_video, content_digest, read_frames

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
