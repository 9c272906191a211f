"""Encode a sample from its rendered conversation and its processed videos and images, for all families."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.clip import Clip
from ..data.decode import PIXELS, refuse_size
from ..data.sample import Sample
from ..data.video import Video
from .chat import Rendered, answer_labels, expand
from .layout import Encoded, TokenLayout, VisionLayout

_FORMATS = frozenset(str.split("JPEG JPEG2000 PNG WEBP BMP GIF TIFF PPM AVIF"))
"""Pillow's names of the supported image formats."""


@dataclass(frozen=True)
class Medium:
    """The tokens and the layout of one video or image.

    kind: ``"video"`` or ``"image"``.
    placeholder, expansion: text of the chat template for it, and the text for the model.
    inputs: the model's inputs of this medium; empty if another medium holds them.
    places: for a video: number of vision tokens → its grid and the place of each token.
    """

    kind: str
    placeholder: str
    expansion: str
    inputs: dict[str, torch.Tensor]
    places: Callable[[int], tuple[tuple[int, int, int], torch.Tensor]] | None = None


def open_images(sample: Sample) -> list[Any]:
    """Decode the sample's own image files as RGB.

    Raises:
        ValueError: a file is missing, not an image of a supported format, or larger than
            ``motionenhancer.data.decode.limit``.
    """
    from PIL import Image

    Image.init()
    formats, opened = sorted(_FORMATS.intersection(Image.OPEN)), []
    for path in sample.images:
        try:
            # Pillow starts other programs for some formats.
            with Image.open(path, formats=formats) as image:
                size = f"has {image.width}×{image.height} pixels"
                refuse_size(path, image.width * image.height, size, PIXELS)
                opened.append(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"sample {sample.id!r}: {path} is not a readable image: {error}") from error
    return opened


def check_media(
    sample: Sample, videos: Sequence[Video], images: Sequence[Any], reserved: Sequence[str]
) -> None:
    """Refuse media that do not fit the conversation.

    Raises:
        ValueError: the numbers of media in the messages differ from ``videos`` and ``images``, or a text
            contains one of the ``reserved`` tokens, such as the vision tokens.
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
    part: Any, max_pixels: int | None, videos: Sequence[Any] = (), frames: tuple[int, int] = (1, 1)
) -> dict[str, dict[str, int]]:
    """The limits of a frame's pixels, as an option of an image or video processor.

    Args:
        part: the processor; its own limits are the default.
        max_pixels: maximum of the run, which is never exceeded.
        videos: videos of a sample, whose rows may give their own limits, the same for all videos.
        frames: numbers of frames that the processor's minimum and maximum of pixels cover.

    Returns:
        `{"size": {"shortest_edge", "longest_edge"}}`, in pixels; empty if the processor's own limits apply.

    Raises:
        ValueError: a limit is below the pixels of one token.
    """
    own = next((video for video in videos if isinstance(video, Clip)), Clip(Path()))
    most = min((n for n in (max_pixels, own.max_pixels) if n is not None), default=None)
    if most is None and own.min_pixels is None:
        return {}
    smallest = (part.patch_size * part.merge_size) ** 2
    if most is not None and most < smallest:
        raise ValueError(f"max_pixels must be at least {smallest} (one token), got {most}")
    low, high = int(part.size["shortest_edge"]), int(part.size["longest_edge"])
    if own.min_pixels is not None:
        low = own.min_pixels * frames[0]
        high = max(high, own.min_pixels * frames[1])
    if most is not None:
        high = most * frames[1] if own.max_pixels is not None else min(high, most * frames[1])
    return {"size": {"shortest_edge": min(low, high * frames[0] // frames[1]), "longest_edge": high}}


def assemble(
    processor: Any,
    sample: Sample,
    rendered: Rendered,
    media: Sequence[Medium],
    vision_inputs: dict[str, torch.Tensor],
    *,
    token_types: bool = False,
    max_length: int | None = None,
    most_text: int | None = None,
) -> Encoded:
    """Expand the placeholders, tokenise, and record the positions of texts, answers and vision tokens.

    Args:
        processor: gives the ``tokenizer`` and the tokens of images and videos.
        sample: named in errors.
        rendered: output of the chat template.
        media: media in the order of the rendered text.
        vision_inputs: returned unchanged.
        token_types: whether to add ``mm_token_type_ids``.
        max_length: maximum number of tokens; only text is cut, never vision tokens.
        most_text: maximum number of text tokens besides the tokenizer's ``model_max_length``.

    Raises:
        ValueError: a video has another number of vision tokens than its family expects; ``max_length`` would
            cut vision tokens; or without it, the text is longer than the model reads.
    """
    text, moved = expand(rendered.text, [(medium.placeholder, medium.expansion) for medium in media])
    # As transformers does: the tokenizer must not repeat a token with which the template begins.
    begins = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    tokenized = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not begins)
    ids = torch.tensor(tokenized["input_ids"], dtype=torch.int64)
    offsets = torch.tensor(tokenized["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    named = (processor.image_token_id, getattr(processor, "video_token_id", None))
    positions = torch.isin(ids, torch.tensor([i for i in named if i is not None])).nonzero()[:, 0]
    most = processor.tokenizer.model_max_length
    most = most if most_text is None else min(most, most_text)
    if max_length is None and (count := len(ids) - len(positions)) > most:
        raise ValueError(
            f"sample {sample.id!r}: its text has {count:,} tokens, but the student reads at most {most:,}"
        )
    starts, videos, end = offsets[positions, 0].contiguous(), [], 0
    for medium in media:
        # A placeholder is unique in the rendered text, so its expansion is found after the last one.
        first = text.index(medium.expansion, end)
        end = first + len(medium.expansion)
        if medium.places is None:
            continue
        part = positions[slice(*torch.searchsorted(starts, torch.tensor([first, end])).tolist())]
        grid, places = medium.places(len(part))
        if len(places) != len(part):
            raise ValueError(
                f"sample {sample.id!r}: {type(processor).__name__} made {len(part)} vision tokens of a "
                f"video, expected {len(places)}"
            )
        videos.append(VisionLayout.placed(part, grid, places))
    labels = answer_labels(ids, offsets, [(moved(a), moved(b)) for a, b in rendered.answer_spans])
    spans = tuple(tuple((moved(a), moved(b)) for a, b in parts) for parts in rendered.text_spans)
    needed = int(positions[-1]) + 1 if len(positions) else 1
    if max_length is not None and max_length < needed:
        raise ValueError(
            f"sample {sample.id!r}: max_length must be at least {needed} to keep its vision tokens, "
            f"got {max_length}"
        )
    kept = slice(max_length)
    types = {}
    if token_types:
        types = {
            "mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids([ids.tolist()])[0])[kept]
        }
    return Encoded(
        ids[kept],
        torch.ones_like(ids[kept]),
        labels[kept],
        TokenLayout(text, offsets[kept], spans, tuple(videos)),
        types,
        vision_inputs,
    )
