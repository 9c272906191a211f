"""Qwen3-VL: a video is one run of tokens for every two frames, each run after its time in seconds as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.students.base import Encoded
from motionenhancer.students.chat import render
from motionenhancer.students.collate import collate
from motionenhancer.students.media import (
    Medium,
    assemble,
    check_media,
    frame_size,
    frames_tensor,
    media_order,
    open_images,
)

__all__ = ["FAMILY", "Qwen3VL"]


class Qwen3VL:
    """The family of ``Qwen3VLForConditionalGeneration``.

    A video's tokens are not contiguous: ``<1.5 seconds>`` and the marks of vision lie between its frames.
    """

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    num_frames: int | None = None
    equal_frames = False

    def in_vision_tower(self, parameter: str) -> bool:
        """See `StudentFamily.in_vision_tower`; mergers are not part of it."""
        name = f".{parameter}"
        return ".visual." in name and ".merger." not in name and ".deepstack_merger_list." not in name

    def encode(
        self,
        processor: Any,
        sample: Sample,
        videos: Sequence[Video],
        images: Sequence[Any] | None = None,
        *,
        max_pixels: int | None = None,
        max_length: int | None = None,
    ) -> Encoded:
        """See :meth:`motionenhancer.students.base.StudentFamily.encode`.

        Token inputs: ``mm_token_type_ids``. Vision inputs: ``pixel_values_videos``, ``video_grid_thw`` and,
        with images, ``pixel_values``, ``image_grid_thw``. Times are the frames' own; a single frame counts
        twice.
        """
        images = open_images(sample) if images is None else list(images)
        start, end = processor.vision_start_token, processor.vision_end_token
        reserved = (processor.video_token, processor.image_token, start, end)
        check_media(sample, videos, images, reserved)
        rendered = render(processor, sample)
        tokens = {"video": processor.video_token, "image": processor.image_token}
        kinds = media_order(rendered.text, tokens)
        left = {"video": iter(videos), "image": iter(images)}
        media: list[Medium] = []
        inputs: dict[str, list[torch.Tensor]] = {}
        for kind in kinds:
            shown = next(left[kind])
            if kind == "image":
                part, processed = processor.image_processor, _image(processor, shown, max_pixels)
            else:
                shown = _at_least_two(shown)
                part, processed = processor.video_processor, _video(processor, sample, shown, max_pixels)
            for name, values in processed.items():
                inputs.setdefault(name, []).append(values)
            t, h, w = processed[f"{kind}_grid_thw"][0].tolist()
            grid = (t, h // part.merge_size, w // part.merge_size)
            if kind == "image":
                count = int(np.prod(grid))
                token = processor.image_token
                media.append(Medium("image", token, token * count, count))
            else:
                media.append(_timed(processor, grid, shown.timestamps))
        return assemble(
            processor,
            sample,
            rendered,
            media,
            {"video": processor.video_token_id, "image": processor.image_token_id},
            {name: torch.cat(values) for name, values in inputs.items()},
            token_types=True,
            max_length=max_length,
        )

    collate = staticmethod(collate)


FAMILY = Qwen3VL()


def _timed(processor: Any, grid: tuple[int, int, int], stamps: np.ndarray) -> Medium:
    frames, height, width = grid
    merged = processor.video_processor.temporal_patch_size
    padded = np.concatenate([stamps, np.repeat(stamps[-1:], frames * merged - len(stamps))])
    times = (padded[::merged] + padded[merged - 1 :: merged]) / 2
    start, end, token = processor.vision_start_token, processor.vision_end_token, processor.video_token
    run = start + token * (height * width) + end
    expansion = "".join(f"<{time:.1f} seconds>{run}" for time in times.tolist())
    placeholder = token if _keeps_marks(processor) else start + token + end
    return Medium("video", placeholder, expansion, frames * height * width, grid)


def _keeps_marks(processor: Any) -> bool:
    """Whether the processor leaves the marks of vision that the template put around a video.

    Versions of transformers differ: some replace the marks along with the placeholder.
    """
    start, end = processor.vision_start_token, processor.vision_end_token
    video = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    ids = processor(
        text=[start + processor.video_token + end],
        videos=[video],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [{"total_num_frames": 2, "fps": 1.0, "frames_indices": [0, 1]}],
        },
    )["input_ids"][0]
    return list(ids).count(processor.vision_start_token_id) > 1


def _at_least_two(video: Video) -> Video:
    if len(video.frames) > 1:
        return video
    return replace(video, frames=np.repeat(video.frames, 2, 0), timestamps=np.repeat(video.timestamps, 2))


def _video(processor: Any, sample: Sample, video: Video, max_pixels: int | None) -> dict[str, torch.Tensor]:
    part = processor.video_processor
    # The size of this processor counts the pixels of all frames together.
    options = frame_size(part, max_pixels, sample.videos, len(video.frames))
    processed = part(videos=[frames_tensor(video)], do_sample_frames=False, return_tensors="pt", **options)
    return {name: processed[name] for name in ("pixel_values_videos", "video_grid_thw")}


def _image(processor: Any, image: Any, max_pixels: int | None) -> dict[str, torch.Tensor]:
    part = processor.image_processor
    options = frame_size(part, max_pixels)
    processed = part(images=[image], return_tensors="pt", **options)
    return {name: processed[name] for name in ("pixel_values", "image_grid_thw")}
