"""LLaVA-OneVision: a video is one run of tokens, pooled 2 x 2 in each frame, and one for a line break."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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
    frames_tensor,
    media_order,
    open_images,
)

__all__ = ["FAMILY", "LlavaOnevision"]


class LlavaOnevision:
    """The family of ``LlavaOnevisionForConditionalGeneration``.

    Frames are resized to the vision tower's square, whatever their shape. The model runs all videos of a
    batch as one tensor, so that they must have equally many frames.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    num_frames: int | None = 32
    """The number of frames a clip that the family was trained on."""
    equal_frames = True

    def in_vision_tower(self, parameter: str) -> bool:
        """See :meth:`motionenhancer.students.base.StudentFamily.in_vision_tower`, without the projector."""
        return ".vision_tower." in f".{parameter}"

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

        Vision inputs: ``pixel_values_videos`` (V, F, 3, H, W) and, with images, ``pixel_values``,
        ``image_sizes``, ``batch_num_images``. ``max_pixels`` changes nothing, as all frames have one size.
        Videos of different lengths are a ValueError.
        """
        images = open_images(sample) if images is None else list(images)
        check_media(sample, videos, images, (processor.video_token, processor.image_token))
        _check_lengths([len(video.frames) for video in videos])
        rendered = render(processor, sample)
        tokens = {"video": processor.video_token, "image": processor.image_token}
        kinds = media_order(rendered.text, tokens)
        left = {"video": iter(videos), "image": iter(range(len(images)))}
        media: list[Medium] = []
        inputs: dict[str, torch.Tensor] = {}
        if images:
            # Nested: several images of one sample are shown whole, a single one in tiles.
            processed = processor.image_processor(images=[images], return_tensors="pt")
            names = ("pixel_values", "image_sizes", "batch_num_images")
            inputs = {name: torch.as_tensor(processed[name]) for name in names}
        if videos:
            shown = [frames_tensor(video) for video in videos]
            pixels = [
                processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
                for video in shown
            ]
            inputs["pixel_values_videos"] = torch.cat([part["pixel_values_videos"] for part in pixels])
        side = math.ceil(math.isqrt(processor.num_image_tokens) / 2)
        for kind in kinds:
            item: Any = next(left[kind])
            if kind == "video":
                grid = (len(item.frames), side, side)
                count = math.prod(grid) + 1
                media.append(Medium(kind, processor.video_token, processor.video_token * count, count, grid))
            else:
                expansion = processor.replace_image_token(inputs, item)
                count = expansion.count(processor.image_token)
                media.append(Medium(kind, processor.image_token, expansion, count))
        return assemble(
            processor,
            sample,
            rendered,
            media,
            {"video": processor.video_token_id, "image": processor.image_token_id},
            inputs,
            max_length=max_length,
        )

    def collate(
        self,
        samples: Sequence[Encoded],
        *,
        pad_token_id: int,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Any]:
        """See :meth:`motionenhancer.students.base.StudentFamily.collate`; videos must be equally long."""
        _check_lengths([frames.shape[0] for s in samples for frames in _of(s, "pixel_values_videos")])
        tiles = max((len(image) for s in samples for image in _of(s, "pixel_values")), default=0)
        return collate(
            [_with_tiles(sample, tiles) for sample in samples],
            pad_token_id=pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )


FAMILY = LlavaOnevision()


def _of(sample: Encoded, name: str) -> Sequence[torch.Tensor]:
    values = sample.vision_inputs.get(name)
    return () if values is None else tuple(values)


def _with_tiles(sample: Encoded, tiles: int) -> Encoded:
    """The same with images of ``tiles`` tiles, the further ones empty; the model leaves them out."""
    values = sample.vision_inputs.get("pixel_values")
    if values is None or values.shape[1] == tiles:
        return sample
    padded = values.new_zeros((len(values), tiles, *values.shape[2:]))
    padded[:, : values.shape[1]] = values
    return replace(sample, vision_inputs={**sample.vision_inputs, "pixel_values": padded})


def _check_lengths(lengths: Sequence[int]) -> None:
    if len(set(lengths)) > 1:
        raise ValueError(
            "videos must all have equally many frames, as LLaVA-OneVision runs them as one tensor; got "
            f"{sorted(set(lengths))}: sample a fixed number of frames"
        )
