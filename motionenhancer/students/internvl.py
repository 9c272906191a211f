"""InternVL3: each frame is a square of tokens of its own, announced by a line of text such as ``Frame1:``."""

from __future__ import annotations

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
    frames_tensor,
    media_order,
    open_images,
)

__all__ = ["FAMILY", "InternVL"]


class InternVL:
    """The family of ``InternVLForConditionalGeneration`` (section 4 of the MotionEnhancer paper).

    A video's tokens are not contiguous: text lies between its frames. Frames are resized to the vision
    tower's square, whatever their shape.
    """

    name = "internvl"
    model_types = ("internvl",)
    num_frames: int | None = 8
    """InternVL's own number of frames a clip, at whatever rate."""
    equal_frames = False

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

        Vision input: ``pixel_values``, one entry a frame or image tile, in the order of the rendered text.
        ``max_pixels`` changes nothing, as all frames have one size.
        """
        images = open_images(sample) if images is None else list(images)
        reserved = (
            processor.video_token,
            processor.image_token,
            processor.start_image_token,
            processor.end_image_token,
        )
        check_media(sample, videos, images, reserved)
        rendered = render(processor, sample)
        tokens = {"video": processor.video_token, "image": processor.image_token}
        kinds = media_order(rendered.text, tokens)
        side = round(processor.image_seq_length**0.5)
        tile = processor.image_token * processor.image_seq_length
        left = {"video": iter(videos), "image": iter(images)}
        media, pixels = [], []
        for kind in kinds:
            shown = next(left[kind])
            # One at a time: the processor itself stacks a sample's videos and wants them equally long.
            values = _frames(processor, shown) if kind == "video" else _tiles(processor, shown)
            count = len(values)
            pixels.append(values)
            if kind == "video":
                lines = [
                    f"Frame{i + 1}: {processor.start_image_token}{tile}{processor.end_image_token}"
                    for i in range(count)
                ]
                expansion = "\n".join(lines)
            else:
                expansion = f"{processor.start_image_token}{tile * count}{processor.end_image_token}"
            media.append(
                Medium(
                    kind,
                    tokens[kind],
                    expansion,
                    count * processor.image_seq_length,
                    (count, side, side) if kind == "video" else None,
                )
            )
        return assemble(
            processor,
            sample,
            rendered,
            media,
            {"video": processor.image_token_id, "image": processor.image_token_id},
            {"pixel_values": torch.cat(pixels)} if pixels else {},
            max_length=max_length,
        )

    collate = staticmethod(collate)


FAMILY = InternVL()


def _frames(processor: Any, video: Video) -> torch.Tensor:
    processed = processor.video_processor(
        videos=[frames_tensor(video)], do_sample_frames=False, return_tensors="pt"
    )
    return processed["pixel_values_videos"][0]


def _tiles(processor: Any, image: Any) -> torch.Tensor:
    # As the family's processor does by default, whatever the stored image processor says.
    return processor.image_processor(images=[image], crop_to_patches=True, return_tensors="pt")[
        "pixel_values"
    ]
