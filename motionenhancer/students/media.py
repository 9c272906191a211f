"""From a rendered conversation and its processed videos and images to an encoded sample: for all families."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionenhancer.data.clip import Clip
from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.students.base import Encoded, TokenLayout, VisionLayout
from motionenhancer.students.chat import Rendered, answer_labels, expand

__all__ = ["Medium", "assemble", "check_media", "frame_size", "frames_tensor", "media_order", "open_images"]


@dataclass(frozen=True)
class Medium:
    """What stands for one video or image.

    kind: ``"video"`` or ``"image"``.
    placeholder, expansion: what the chat template rendered, and what the model is given for it.
    tokens: vision tokens in ``expansion``; those of the grid come first.
    grid: (F, H, W) of a video; None for an image.
    """

    kind: str
    placeholder: str
    expansion: str
    tokens: int
    grid: tuple[int, int, int] | None = None


def open_images(sample: Sample) -> list[Any]:
    """Decode the sample's own image files as RGB.

    Raises:
        ValueError: a file is missing or no image.
    """
    from PIL import Image

    opened = []
    for path in sample.images:
        try:
            with Image.open(path) as image:
                opened.append(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"sample {sample.id!r}: {path} is not a readable image: {error}") from error
    return opened


def check_media(
    sample: Sample, videos: Sequence[Video], images: Sequence[Any], reserved: Sequence[str]
) -> None:
    """Refuse what does not fit the conversation.

    Raises:
        ValueError: the messages show other numbers of media than ``videos`` and ``images``, or a text
            contains one of the ``reserved`` tokens that stand for vision.
    """
    kinds: list[str] = []
    for i, message in enumerate(sample.messages):
        for part in message["content"]:
            if part["type"] in ("video", "image"):
                kinds.append(part["type"])
            for token in reserved:
                if token in part.get("text", ""):
                    raise ValueError(f"sample {sample.id!r}: message {i} must not contain {token!r} as text")
    for kind, given in (("video", videos), ("image", images)):
        if kinds.count(kind) != len(given):
            raise ValueError(
                f"sample {sample.id!r} shows {kinds.count(kind)} {kind}s in its messages, got {len(given)}"
            )


def media_order(text: str, placeholders: Mapping[str, str]) -> list[str]:
    """Return the kinds of media in the order in which the chat template rendered them.

    Some templates show a message's images first, then its videos, then its text.

    >>> media_order("a <v> b <i>", {"image": "<i>", "video": "<v>"})
    ['video', 'image']
    """
    kinds = {token: kind for kind, token in placeholders.items()}
    return [kinds[found] for found in re.findall("|".join(map(re.escape, kinds)), text)]


def frame_size(
    part: Any, max_pixels: int | None, videos: Sequence[Any] = (), frames: int = 1
) -> dict[str, dict[str, int]]:
    """The limits of a frame's pixels as an option of a Qwen processor of images or videos.

    Args:
        part: the processor; its own limits hold where nothing is said.
        max_pixels: the run's, which are never exceeded.
        videos: a sample's, whose rows may give limits of their own, one for all of them.
        frames: how many frames the processor's limits count together.

    Returns:
        `{"size": {"shortest_edge", "longest_edge"}}`, in pixels, or nothing where the processor's own hold.

    Raises:
        ValueError: a limit is below the pixels of one token.
    """
    own = next((video for video in videos if isinstance(video, Clip)), Clip(Path()))
    most = min((n for n in (max_pixels, own.max_pixels) if n is not None), default=None)
    if most is None and own.min_pixels is None:
        return {}
    smallest = (part.patch_size * part.merge_size) ** 2
    if most is not None and most < smallest:
        raise ValueError(f"max_pixels must be at least {smallest}, one token, got {most}")
    low, high = int(part.size["shortest_edge"]), int(part.size["longest_edge"])
    if own.min_pixels is not None:
        low = own.min_pixels * frames
        high = max(low, high)
    if most is not None:
        high = most * frames if own.max_pixels is not None else min(high, most * frames)
    return {"size": {"shortest_edge": min(low, high), "longest_edge": high}}


def frames_tensor(video: Video) -> torch.Tensor:
    """Return (F, 3, H, W) uint8 frames, as video processors take them."""
    return torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2)


def assemble(
    processor: Any,
    sample: Sample,
    rendered: Rendered,
    media: Sequence[Medium],
    vision_tokens: Mapping[str, int],
    vision_inputs: dict[str, torch.Tensor],
    *,
    token_types: bool = False,
    expected_ids: torch.Tensor | None = None,
    max_length: int | None = None,
) -> Encoded:
    """Expand the placeholders, tokenise, and note where texts, answers and vision tokens lie.

    Args:
        processor: its ``tokenizer`` is used.
        sample: named in errors.
        rendered: the conversation as the chat template gave it.
        media: in the order of the rendered text.
        vision_tokens: for each kind of medium the id of its vision tokens; kinds may share one.
        vision_inputs: kept as they are.
        token_types: add ``mm_token_type_ids``, 1 at image tokens and 2 at video tokens.
        expected_ids: (N,) the ids the family's own processor made, if it was asked.
        max_length: cuts the text, never vision tokens.

    Raises:
        ValueError: the ids are not ``expected_ids``, the vision tokens not those of ``media``, or
            ``max_length`` would cut some.
    """
    text, moved = expand(rendered.text, [(medium.placeholder, medium.expansion) for medium in media])
    tokenized = processor.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(tokenized["input_ids"], dtype=torch.int64)
    if expected_ids is not None and not torch.equal(ids, expected_ids):
        raise ValueError(
            f"sample {sample.id!r}: {type(processor).__name__} did not expand the videos as expected"
        )
    positions = torch.isin(ids, torch.tensor(sorted(set(vision_tokens.values())))).nonzero()[:, 0]
    if len(positions) != sum(medium.tokens for medium in media):
        raise ValueError(
            f"sample {sample.id!r} has {len(positions)} vision tokens, its videos and images need "
            f"{sum(medium.tokens for medium in media)}"
        )
    types, videos = torch.zeros_like(ids), []
    for medium, part in zip(media, positions.split([medium.tokens for medium in media]), strict=True):
        types[part] = 1 if medium.grid is None else 2
        if medium.grid is not None:
            videos.append(VisionLayout(part[: int(np.prod(medium.grid))], medium.grid))
    offsets = torch.tensor(tokenized["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    labels = answer_labels(ids, offsets, [(moved(a), moved(b)) for a, b in rendered.answer_spans])
    spans = tuple(tuple((moved(a), moved(b)) for a, b in parts) for parts in rendered.text_spans)
    needed = int(positions[-1]) + 1 if len(positions) else 1
    if max_length is not None and max_length < needed:
        raise ValueError(
            f"sample {sample.id!r}: max_length must be at least {needed} to keep its vision tokens, "
            f"got {max_length}"
        )
    kept = slice(max_length)
    return Encoded(
        ids[kept],
        torch.ones_like(ids[kept]),
        labels[kept],
        TokenLayout(text, offsets[kept], spans, tuple(videos)),
        {"mm_token_type_ids": types[kept]} if token_types else {},
        vision_inputs,
    )
