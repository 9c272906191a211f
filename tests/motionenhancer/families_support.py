"""Samples and batches that the tests of all families share."""

from __future__ import annotations

from typing import Any

from PIL import Image
from students_support import TEXTS, clip, dialogue

from motionenhancer.data.sample import Sample

VISION = ("pixel_values", "pixel_values_videos")


def picture(height: int, width: int, seed: int = 9) -> Image.Image:
    return Image.fromarray(clip(1, height, width, seed=seed).frames[0])


def mixed(image: bool = True) -> Sample:
    """Two turns, a video and an image between texts, another video in the second turn."""
    shown = [{"type": "video"}, {"type": "image"}] if image else [{"type": "video"}]
    text = {"type": "text", "text": "What moves, and where?"}
    return Sample(
        "mixed",
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [text, *shown, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "The red one, left."}]},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And naïve 動く?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Nothing. 👩‍🚀"}]},
        ],
    )


def encode_mixed(student: Any, *videos: Any) -> Any:
    """`mixed`, encoded, without the image where a family takes none beside a video."""
    _, processor, family = student
    images = [picture(30, 50)] if family.images_with_videos else []
    return family.encode(processor, mixed(bool(images)), videos, images)


def batch_of(student: Any, side: str = "right", multiple: int | None = None) -> Any:
    _, processor, family = student
    samples = [
        family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 32, 48)]),
        encode_mixed(student, clip(4, 32, 48, seed=1), clip(4, 16, 24, seed=2)),
        family.encode(processor, dialogue(*TEXTS[2], videos=0), []),
    ]
    batch = family.collate(
        samples,
        pad_token_id=processor.tokenizer.pad_token_id,
        padding_side=side,
        pad_to_multiple_of=multiple,
    )
    layouts = batch.pop("layouts")
    return {k: v.double() if k in VISION else v for k, v in batch.items()}, layouts, samples
