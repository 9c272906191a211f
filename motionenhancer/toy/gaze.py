"""Whether the words of a toy student attend to the object that they speak of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from motionenhancer.alignment.dataset import find_words
from motionenhancer.data import Sample, prompt_text
from motionenhancer.data.video import Video
from motionenhancer.students.capture import capture_attention
from motionenhancer.toy.accuracy import samples_of, shown_clip
from motionenhancer.toy.language import phrase
from motionenhancer.toy.world import ToyFolder

__all__ = ["attention_on_objects", "cells_of"]

_BATCH = 25


def cells_of(boxes: np.ndarray, size: tuple[int, int], grid: tuple[int, int, int]) -> np.ndarray:
    """Find the cells of a grid that an object touches.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in pixels, of n frames; an empty box is an object out of the frame.
        size: height and width of a frame.
        grid: (F, H, W); each of the F places holds the same number of the n frames, the last may hold fewer.

    Returns:
        (F·H·W,) bool in raster order.
    """
    frames, rows, columns = grid
    found = np.zeros(grid, bool)
    each = -(-len(boxes) // frames)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if x1 > x0 and y1 > y0:
            top, bottom = int(y0 * rows // size[0]), int(np.ceil(y1 * rows / size[0]))
            left, right = int(x0 * columns // size[1]), int(np.ceil(x1 * columns / size[1]))
            found[i // each, top:bottom, left:right] = True
    return found.reshape(-1)


def _named(text: str, objects: list[dict[str, Any]]) -> list[tuple[tuple[int, int], int]]:
    """Spans of the words that name an object, or say what the named object does; and which object it is."""
    found = []
    for i, one in enumerate(objects):
        does = phrase(SimpleNamespace(**one))
        for name in re.finditer(rf"\b{one['name']}\b(?: {does}\b)?", text, re.IGNORECASE):
            words = re.finditer(r"\w+", name.group())
            found += [((name.start() + w.start(), name.start() + w.end()), i) for w in words]
    return sorted(found)


@torch.no_grad()
def attention_on_objects(model: Any, processor: Any, family: Any, world: Path) -> dict[str, float]:
    """Measure the attention of words to the object that they speak of, in the test questions with answers.

    Args:
        model, processor, family: of the student; the model is in evaluation mode.
        world: folder of a toy world.

    Returns:
        "share": percentage of a word's attention over the video that lies on the cells of its object,
            averaged over words and clips. The words are those of an object's name, and after it those that
            say what the object does.
        "area": percentage of all cells that are cells of the object, the share of a uniform map.
        "clips": number of clips that name an object.
    """
    folder = ToyFolder(world)
    lines = folder.worlds.read_text(encoding="utf-8").splitlines()
    scenes = {scene["video"]: scene for scene in map(json.loads, lines)}
    asked: list[tuple[Sample, list[tuple[tuple[int, int], int]], dict[str, Any]]] = []
    for sample in samples_of(folder.test, folder.videos):
        scene = scenes[Path(str(sample.videos[0])).name]
        if words := _named(prompt_text(sample, "both")[0], scene["objects"]):
            asked.append((sample, words, scene))
    found: list[tuple[float, float]] = []
    for start in range(0, len(asked), _BATCH):
        found += _read(model, processor, family, asked[start : start + _BATCH])
    share, area = np.mean(found, axis=0) if found else (np.nan, np.nan)
    return {"share": 100 * float(share), "area": 100 * float(area), "clips": len(found)}


def _read(model: Any, processor: Any, family: Any, asked: list[Any]) -> list[tuple[float, float]]:
    """The share and the area of each clip."""
    encoded, chosen, cells = [], [], []
    for sample, words, scene in asked:
        video: Video = shown_clip(sample.videos[0], "video", 0)
        encoded.append(family.encode(processor, sample, [video]))
        spans = SimpleNamespace(prompt=prompt_text(sample, "both")[0], spans=[span for span, _ in words])
        tokens = find_words(sample, spans, encoded[-1].layout, "both")
        shown = np.rint(np.asarray(video.timestamps) * scene["fps"]).astype(int)
        grid = encoded[-1].layout.videos[0].grid
        size = scene["height"], scene["width"]
        touched = [cells_of(np.array(one["boxes"])[shown], size, grid) for one in scene["objects"]]
        chosen.append(torch.tensor(tokens.rows))
        cells.append([touched[words[word][1]] for word in tokens.row_tokens])
    batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id)
    vision = torch.stack([layout.videos[0].positions for layout in batch.pop("layouts")])
    rows = pad_sequence(chosen, batch_first=True, padding_value=-1)
    device = next(model.parameters()).device
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"
    }
    with capture_attention(model, rows, vision) as captured:
        model(**inputs, use_cache=False)
    maps = captured.attention.double().cpu().numpy()
    found = []
    for attention, inside in zip(maps, cells, strict=True):
        here = attention[: len(inside)]
        shares = (here * inside).sum(1) / here.sum(1)
        found.append((float(shares.mean()), float(np.mean(inside))))
    return found
