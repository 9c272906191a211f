"""What token ids stand for, from any template: characters of the conversation, places of the video."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from ..data import Sample
from ..students.families import processor_family
from ..students.family import Grid
from ..students.layout import TokenLayout, VisionLayout


def read_layout(
    input_ids: torch.Tensor,
    sample: Sample,
    processor: Any,
    *,
    grid_thw: Any = None,
    position_ids: torch.Tensor | None = None,
    start: int = 0,
) -> TokenLayout:
    """Read the layout of a sample from its token ids alone, for any chat template.

    A message is searched from the end of the text backward. Places where it ends before a special token come
    first. So a system prompt or the name of a role is not mistaken for the message.

    Args:
        input_ids: (N,) int64 without padding. Each video token stands for one place of the grid.
        sample: the conversation from which the ids were made, with one video.
        processor: of the student, with a fast tokenizer; of Qwen2-VL to Qwen3.5, GLM-4.1V to 4.6V, Gemma 4,
            InternVL, LLaVA-OneVision, SmolVLM, or VideoLLaMA3 without token compression.
        grid_thw: (T, H, W) of the video in patches, for families whose processors give `video_grid_thw`.
        position_ids: (F, patches, 2) places (x, y) of the patches of each frame, for Gemma 4: the video's
            part of `video_position_ids`.
        start: padding tokens before the first.

    Returns:
        The layout. A message that is not in the ids has no characters in the layout. Of a text that was cut,
        the rest is found.

    Raises:
        ValueError: a slow tokenizer; another processor; video tokens that do not fill a grid; images beside
            the video in a family that has one token for both.
    """
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; alignment needs a fast one")
    token = video_token(processor)
    if sample.images and processor_family(processor).shared_token:
        raise ValueError("images and videos share a token in this family: leave out samples with images")
    positions = (input_ids == token).nonzero()[:, 0].cpu()
    grid, places = _places(processor, len(positions), grid_thw, position_ids)
    text, offsets, stops = _spell(input_ids.tolist(), tokenizer, token)
    text, spans = _message_spans(text, stops, sample)
    video = VisionLayout.placed(positions + start, grid, places)
    return TokenLayout(text, torch.tensor(offsets, dtype=torch.int64), spans, (video,), start)


def video_grid(
    processor: Any, tokens: int, grid_thw: Any = None, position_ids: torch.Tensor | None = None
) -> Grid:
    """(F, H, W) of a video with this number of tokens, after spatial and temporal merging.

    Args, Raises: as of `read_layout`.
    """
    return _places(processor, tokens, grid_thw, position_ids)[0]


def video_token(processor: Any) -> int:
    """The id of the tokens that stand for a video in what the model gets."""
    shared = processor_family(processor).shared_token
    return int(processor.image_token_id if shared else processor.video_token_id)


def _places(
    processor: Any, tokens: int, grid_thw: Any, position_ids: torch.Tensor | None
) -> tuple[Grid, torch.Tensor]:
    """The grid, and the place of each token in it, by the rule of the processor's family."""
    family, name = processor_family(processor), type(processor).__name__
    if family.untold:
        raise ValueError(f"{name}: token ids do not tell the layout: {family.untold}")
    frames, each, made = 0, 0, dict[str, torch.Tensor]()
    if family.frame_tokens is not None:
        each = family.frame_tokens(processor)
        frames = tokens // each
        if not frames:
            raise ValueError(f"{tokens} video tokens do not fill a frame of {name}, which has {each}")
    elif family.grid_input == "video_grid_thw" and grid_thw is not None:
        made = {"video_grid_thw": torch.as_tensor(grid_thw).view(1, 3)}
    elif family.grid_input == "video_position_ids" and position_ids is not None:
        frames, made = len(position_ids), {"video_position_ids": position_ids}
    else:
        raise ValueError(f"{name}: the batch has no {family.grid_input}, which gives the grid")
    grid, places = family.places(processor, (frames, 0, 0), made, tokens)
    if not tokens or len(places) != tokens or each not in (0, grid[1] * grid[2]):
        dropped = getattr(processor.video_processor, "use_token_compression", False)
        why = ": use_token_compression drops tokens; switch it off" if dropped else ""
        raise ValueError(f"{tokens} video tokens do not fill the grid {grid} of {name}{why}")
    return grid, places


def _spell(ids: list[int], tokenizer: Any, video: int) -> tuple[str, list[tuple[int, int]], set[int]]:
    """The text, the characters of each token, and where special tokens begin; video tokens have no text."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    text, offsets, waiting = "", [(0, 0)] * len(ids), list[int]()
    stops: set[int] = set()
    for at, token in enumerate(ids):
        if token == video:
            offsets[at] = (len(text), len(text))
            stops.add(len(text))
            continue
        if token in special:
            stops.add(len(text))
        waiting.append(at)
        piece = stream.step(backend, token)
        if piece is not None:  # None: a character's bytes are not complete yet
            for one in waiting:
                offsets[one] = (len(text), len(text) + len(piece))
            text += piece
            waiting.clear()
    return text, offsets, stops | {len(text)}


def _message_spans(
    text: str, stops: set[int], sample: Sample
) -> tuple[str, tuple[tuple[tuple[int, int], ...], ...]]:
    """Find the parts of each message in the text; a part that was cut at the end is completed."""
    found: list[tuple[tuple[int, int], ...]] = []
    end = len(text)
    for message in reversed(sample.messages):
        spans: list[tuple[int, int]] = []
        for part in reversed(message["content"]):
            piece = part.get("text", "").strip() if part["type"] == "text" else ""
            if not piece:
                continue
            span = _last(piece, text, end, stops)
            if span is None and end == len(text) and (cut := _cut(piece, text, stops)) is not None:
                span, text = (cut, cut + len(piece)), text[:cut] + piece
            spans.append(span or (end, end))
            end = spans[-1][0]
        found.append(tuple(reversed(spans)))
    return text, tuple(reversed(found))


def _last(piece: str, text: str, end: int, stops: set[int]) -> tuple[int, int] | None:
    pattern = re.compile(r"\s+".join(map(re.escape, piece.split())))
    spans = [match.span() for match in pattern.finditer(text, 0, end)]
    # If only spaces stand between a piece and a special token, the piece ends a message.
    whole = [span for span in spans if len(text) - len(text[span[1] :].lstrip()) in stops]
    return whole[-1] if whole else spans[-1] if spans else None


def _cut(piece: str, text: str, stops: set[int]) -> int | None:
    """Where the text ends with the beginning of `piece`, after its last special token."""
    after = max((stop for stop in stops if stop < len(text)), default=0)
    ends = range(max(after, len(text) - len(piece) + 1), len(text))
    return next((at for at in ends if piece.startswith(text[at:])), None)
