"""Qwen2.5-VL: a video is one run of tokens, two frames and 2 x 2 patches each, in raster order t, h, w."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.vlm.base import Encoded, TokenLayout, VisionLayout
from motionenhancer.vlm.collate import collate
from motionenhancer.vlm.conversation import answer_labels, expand, render

__all__ = ["FAMILY", "Qwen25VL"]


class Qwen25VL:
    """The family of ``Qwen2_5_VLForConditionalGeneration`` (section 4 of the MotionEnhancer paper)."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)

    def in_vision_tower(self, parameter: str) -> bool:
        """See :meth:`motionenhancer.vlm.base.StudentFamily.in_vision_tower`; the merger is not part of it."""
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
        """See :meth:`motionenhancer.vlm.base.StudentFamily.encode`.

        Token inputs: ``mm_token_type_ids``, without which the model falls back to plain positions. Vision
        inputs: ``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts`` (seconds between two token
        frames, from the frames' own time stamps) and, with images, ``pixel_values``, ``image_grid_thw``.
        """
        images = _open_images(sample) if images is None else list(images)
        kinds = _check_media(processor, sample, videos, images)
        rendered = render(processor, sample)
        inputs = _process(processor, rendered.text, videos, images, max_pixels)
        counts = {
            "video": _token_counts(inputs.get("video_grid_thw"), processor.video_processor.merge_size),
            "image": _token_counts(inputs.get("image_grid_thw"), processor.image_processor.merge_size),
        }
        tokens = {"video": processor.video_token, "image": processor.image_token}
        left = {kind: iter(count) for kind, count in counts.items()}
        replacements = [(tokens[kind], tokens[kind] * next(left[kind])) for kind in kinds]
        text, moved = expand(rendered.text, replacements)
        ids = inputs.pop("input_ids")[0]
        tokenized = processor.tokenizer(text, return_offsets_mapping=True)
        if tokenized["input_ids"] != ids.tolist():
            raise ValueError(
                f"sample {sample.id!r}: the processor did not expand the videos as Qwen2.5-VL's does"
            )
        offsets = torch.tensor(tokenized["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        labels = answer_labels(ids, offsets, [(moved(a), moved(b)) for a, b in rendered.answer_spans])
        spans = tuple(tuple((moved(a), moved(b)) for a, b in parts) for parts in rendered.text_spans)
        layout = TokenLayout(text, offsets, spans, _vision(processor, inputs, ids))
        token_inputs = {"mm_token_type_ids": inputs.pop("mm_token_type_ids")[0].long()}
        inputs.pop("attention_mask", None)
        if len(videos):
            inputs["second_per_grid_ts"] = _seconds_per_grid(processor, videos)
        encoded = Encoded(ids, torch.ones_like(ids), labels, layout, token_inputs, inputs)
        return encoded if max_length is None else _cut(encoded, max_length, sample)

    collate = staticmethod(collate)


FAMILY = Qwen25VL()


def _open_images(sample: Sample) -> list[Any]:
    from PIL import Image

    opened = []
    for path in sample.images:
        try:
            with Image.open(path) as image:
                opened.append(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"sample {sample.id!r}: {path} is not a readable image: {error}") from error
    return opened


def _check_media(processor: Any, sample: Sample, videos: Sequence[Video], images: Sequence[Any]) -> list[str]:
    """Return the kinds of media in the order of the conversation."""
    kinds: list[str] = []
    placeholders = (processor.video_token, processor.image_token)
    for i, message in enumerate(sample.messages):
        for part in message["content"]:
            if part["type"] in ("video", "image"):
                kinds.append(part["type"])
            for token in placeholders:
                if token in part.get("text", ""):
                    raise ValueError(f"sample {sample.id!r}: message {i} must not contain {token!r} as text")
    for kind, given in (("video", videos), ("image", images)):
        if kinds.count(kind) != len(given):
            raise ValueError(
                f"sample {sample.id!r} shows {kinds.count(kind)} {kind}s in its messages, got {len(given)}"
            )
    return kinds


def _process(
    processor: Any, text: str, videos: Sequence[Video], images: Sequence[Any], max_pixels: int | None
) -> dict[str, Any]:
    options: dict[str, Any] = {"videos_kwargs": {"do_sample_frames": False}, "images_kwargs": {}}
    if videos:
        frames = [
            torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2) for video in videos
        ]
        options["videos"] = frames
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
    if max_pixels is not None:
        for kind, part in (
            ("videos_kwargs", processor.video_processor),
            ("images_kwargs", processor.image_processor),
        ):
            options[kind]["size"] = _capped(part, max_pixels)
    options["videos_kwargs"] = options["videos_kwargs"] if videos else {}
    return dict(processor(text=[text], return_tensors="pt", **options))


def _capped(part: Any, max_pixels: int) -> dict[str, int]:
    smallest = (part.patch_size * part.merge_size) ** 2
    if max_pixels < smallest:
        raise ValueError(f"max_pixels must be at least {smallest}, one token, got {max_pixels}")
    size = part.size
    return {
        "shortest_edge": min(int(size["shortest_edge"]), max_pixels),
        "longest_edge": min(int(size["longest_edge"]), max_pixels),
    }


def _token_counts(grids: torch.Tensor | None, merge_size: int) -> list[int]:
    return [] if grids is None else (grids.prod(dim=-1) // merge_size**2).tolist()


def _vision(processor: Any, inputs: dict[str, Any], ids: torch.Tensor) -> tuple[VisionLayout, ...]:
    grids = inputs.get("video_grid_thw")
    if grids is None:
        return ()
    merge = processor.video_processor.merge_size
    positions = (ids == processor.video_token_id).nonzero()[:, 0]
    shapes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    parts = positions.split([t * h * w for t, h, w in shapes])
    return tuple(VisionLayout(part, shape) for part, shape in zip(parts, shapes, strict=True))


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


def _cut(encoded: Encoded, max_length: int, sample: Sample) -> Encoded:
    layout = encoded.layout
    vision = encoded.token_inputs["mm_token_type_ids"].nonzero()[:, 0]
    needed = int(vision[-1]) + 1 if len(vision) else 1
    if max_length < needed:
        raise ValueError(
            f"sample {sample.id!r}: max_length must be at least {needed} to keep its vision tokens, "
            f"got {max_length}"
        )
    return Encoded(
        encoded.input_ids[:max_length],
        encoded.attention_mask[:max_length],
        encoded.labels[:max_length],
        TokenLayout(layout.text, layout.offsets[:max_length], layout.message_spans, layout.videos),
        {name: tensor[:max_length] for name, tensor in encoded.token_inputs.items()},
        encoded.vision_inputs,
    )
