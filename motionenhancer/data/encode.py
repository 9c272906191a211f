"""Write frames to a video file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def encode_video(path: str | Path, frames: np.ndarray, *, fps: float = 8, codec: str | None = None) -> None:
    """Encode frames as mp4, with any file suffix. The same frames always give the same bytes.

    Args:
        path: the file to write.
        frames: (n, h, w, 3) uint8, RGB; h and w are even.
        fps: frames per second.
        codec: libav's name of an encoder. Default: "libx264" if PyAV has it, else "mpeg4".

    Raises:
        ValueError: frames have another shape or dtype, an odd side, or are empty; fps is not positive.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        got = f"{frames.shape} {frames.dtype}"
        raise ValueError(f"frames must be a (n, h, w, 3) uint8 array, got {got}")
    count, height, width, _ = frames.shape
    if not count or not height or not width or height % 2 or width % 2:
        raise ValueError(f"frames must hold at least one frame of even height and width, got {frames.shape}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if codec is None:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # x264's macroblock tree makes the same frames into different bytes from one call to the next.
    options = {"crf": "14", "preset": "veryfast", "mbtree": "0"} if codec == "libx264" else {"qscale": "2"}
    with av.open(f"file:{path}", mode="w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
