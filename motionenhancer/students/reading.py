"""Read one sample with a student: where the words of its text look."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.sample import Sample, prompt_text
from ..data.video import Video
from .capture import capture_attention
from .family import Grid, StudentFamily
from .layout import TokenLayout
from .words import WordMap, find_words


@dataclass(frozen=True)
class TextRange:
    """Character ranges of a text, as words to locate."""

    prompt: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class StudentMaps:
    """The attention of a text's tokens to the video.

    Attributes:
        layout: layout of the sample's tokens.
        grid, times: (F, H, W) of the vision tokens, and F times in seconds.
        rows: positions of the text tokens that can see the video.
        attention: (len(rows), F·H·W) float32 on the CPU.
    """

    layout: TokenLayout
    grid: Grid
    times: list[float]
    rows: list[int]
    attention: torch.Tensor

    def of_words(self, words: WordMap) -> dict[int, torch.Tensor]:
        """The mean row (F·H·W,) of each word that was found."""
        place = {row: i for i, row in enumerate(self.rows)}
        rows: dict[int, list[int]] = {}
        for row, word in zip(words.rows, words.row_tokens, strict=True):
            rows.setdefault(word, []).append(place[row])
        return {word: self.attention[places].mean(dim=0) for word, places in rows.items()}


@torch.no_grad()
def read_maps(
    model: Any,
    family: StudentFamily,
    processor: Any,
    sample: Sample,
    video: Video,
    source: str,
    *,
    max_pixels: int | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> tuple[StudentMaps, Any, torch.Tensor]:
    """Run a student over one sample in evaluation mode; no random number is drawn.

    Args:
        model, family, processor: as `load_student` returns them; the model's mode is restored.
        sample: a sample with one video.
        video: the sampled frames.
        source: the text to read: "both", "question" or "answer".
        max_pixels: as for `StudentFamily.encode`.
        autocast: autocast context of the training's mixed precision.

    Returns:
        The maps, the model's output, and (N - 1,) labels for all logits except the last.

    Raises:
        ValueError: the sample cannot be encoded.
    """
    encoded = family.encode(processor, sample, [video], max_pixels=max_pixels)
    layout = encoded.layout
    prompt, segments = prompt_text(sample, source)  # type: ignore[arg-type]
    whole = TextRange(prompt, [(start, end) for start, end, _ in segments])
    rows = sorted(set(find_words(sample, whole, layout, source).rows))
    vision = layout.videos[0]
    batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
    batch.pop("layouts")
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    was_training, labels = model.training, batch["labels"][0, 1:]
    try:
        model.eval()
        with (
            autocast or nullcontext(),
            capture_attention(model, torch.tensor([rows]), vision.positions[None]) as captured,
        ):
            out = model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
    # Each frame of the grid stands for the same number of the clip's frames, except the last.
    each = math.ceil(len(video.timestamps) / vision.grid[0])
    shown = [video.timestamps[i * each : (i + 1) * each] for i in range(vision.grid[0])]
    times = [float(np.mean(part if len(part) else video.timestamps[-1:])) for part in shown]
    attention = captured.attention[0].float().cpu()
    return StudentMaps(layout, vision.grid, times, rows, attention), out, labels
