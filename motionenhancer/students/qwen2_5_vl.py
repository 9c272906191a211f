"""Qwen2.5-VL: a video is one run of tokens, two frames and 2 x 2 patches each, in raster order t, h, w."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

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

__all__ = ["FAMILY", "Qwen25VL"]


class Qwen25VL:
    """The family of ``Qwen2_5_VLForConditionalGeneration`` (section 4 of the MotionEnhancer paper)."""

    name = "qwen2_5_vl"
    model_types: tuple[str, ...] = ("qwen2_5_vl",)
    num_frames: int | None = None
    equal_frames = False

    def in_vision_tower(self, parameter: str) -> bool:
        """See `StudentFamily.in_vision_tower`; the merger is not part of it."""
        return ".visual." in f".{parameter}" and ".visual.merger." not in f".{parameter}"

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

        Token inputs: ``mm_token_type_ids``, without which the model falls back to plain positions. Vision
        inputs: ``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts`` (seconds between two token
        frames, from the frames' own time stamps) and, with images, ``pixel_values``, ``image_grid_thw``.
        """
        images = open_images(sample) if images is None else list(images)
        check_media(sample, videos, images, (processor.video_token, processor.image_token))
        rendered = render(processor, sample)
        tokens = {"video": processor.video_token, "image": processor.image_token}
        kinds = media_order(rendered.text, tokens)
        inputs = _process(processor, sample, rendered.text, videos, images, max_pixels)
        shapes = {
            "video": iter(_grids(inputs.get("video_grid_thw"), processor.video_processor.merge_size)),
            "image": iter(_grids(inputs.get("image_grid_thw"), processor.image_processor.merge_size)),
        }
        media = []
        for kind in kinds:
            grid = next(shapes[kind])
            count = grid[0] * grid[1] * grid[2]
            shape = grid if kind == "video" else None
            media.append(Medium(kind, tokens[kind], tokens[kind] * count, count, shape))
        ids = inputs.pop("input_ids")[0]
        for name in ("attention_mask", "mm_token_type_ids"):
            inputs.pop(name, None)
        if len(videos):
            inputs["second_per_grid_ts"] = _seconds_per_grid(processor, videos)
        return assemble(
            processor,
            sample,
            rendered,
            media,
            {"video": processor.video_token_id, "image": processor.image_token_id},
            inputs,
            token_types=True,
            expected_ids=ids,
            max_length=max_length,
        )

    collate = staticmethod(collate)


FAMILY = Qwen25VL()


def _process(
    processor: Any,
    sample: Sample,
    text: str,
    videos: Sequence[Video],
    images: Sequence[Any],
    max_pixels: int | None,
) -> dict[str, Any]:
    options: dict[str, Any] = {"videos_kwargs": {"do_sample_frames": False}, "images_kwargs": {}}
    if videos:
        options["videos"] = [frames_tensor(video) for video in videos]
        options["videos_kwargs"]["video_metadata"] = [
            {
                "total_num_frames": len(video.frames),
                "fps": 1.0 / _interval(video),
                "frames_indices": list(range(len(video.frames))),
            }
            for video in videos
        ]
    if images:
        options["images"] = list(images)
    options["videos_kwargs"] |= frame_size(processor.video_processor, max_pixels, sample.videos)
    options["images_kwargs"] |= frame_size(processor.image_processor, max_pixels)
    options["videos_kwargs"] = options["videos_kwargs"] if videos else {}
    return dict(processor(text=[text], return_tensors="pt", **options))


def _grids(grids: torch.Tensor | None, merge_size: int) -> list[tuple[int, int, int]]:
    return [] if grids is None else [(t, h // merge_size, w // merge_size) for t, h, w in grids.tolist()]


def _interval(video: Video) -> float:
    """Mean seconds between two frames; one second for a single frame, where it does not matter.

    The model rounds times down to its own grid, and a decoded frame is only the nearest to its ideal time:
    what is within 2 % of a whole number of frames a second, or of seconds a frame, is taken for it.
    """
    stamps = video.timestamps
    if len(stamps) < 2 or stamps[-1] <= stamps[0]:
        return 1.0
    seconds = float(stamps[-1] - stamps[0]) / (len(stamps) - 1)
    whole = round(seconds) if seconds >= 1 else 1 / round(1 / seconds)
    return float(whole) if abs(seconds - whole) <= 0.02 * seconds else seconds


def _seconds_per_grid(processor: Any, videos: Sequence[Video]) -> torch.Tensor:
    merged = processor.video_processor.temporal_patch_size
    seconds = torch.tensor([merged * _interval(video) for video in videos], dtype=torch.float32)
    if bool((seconds != seconds.round()).any()) and _truncates_seconds():
        warnings.warn(
            "transformers before 5.18 truncates the seconds between token frames to whole numbers; upgrade "
            "it, or sample frames so that two of them are whole seconds apart",
            stacklevel=3,
        )
    return seconds


def _truncates_seconds() -> bool:
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) < Version("5.18")
