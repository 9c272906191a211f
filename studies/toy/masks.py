"""True masks of the objects of a toy clip on a teacher's grid: the best possible prior."""

from __future__ import annotations

import re

import numpy as np
import torch

from motionenhancer.priors.prior import MotionPrior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.toy.scene import COLOURS, DIRECTIONS, SHAPES, Scene

__all__ = ["WORD_CLASSES", "grid_mask", "looks_prior", "mask_prior", "prior_of_rows", "word_class"]

WORD_CLASSES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "verb": ("moves", "hops", "do", "move", "hop"),
    "direction": tuple(DIRECTIONS),
    "count": ("one", "two", "three", "time", "times"),
    "place": ("top", "bottom"),
    "object": ("object",),
}
"""Words that speak of an object, by kind; every other word is a function word."""


def word_class(word: str) -> str:
    """Name the class of a word or token: one of :data:`WORD_CLASSES`, "function" or "punctuation"."""
    core = re.sub(r"[^a-z]", "", word.lower())
    if not core:
        return "punctuation"
    return next((name for name, words in WORD_CLASSES.items() if core in words), "function")


def grid_mask(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Average an object's (n, h, w) coverage over the cells of ``grid`` (F, H, W).

    The first of the F cells in time is the first frame alone, as in the teacher's VAE; the other cells hold
    equal numbers of the other frames.
    """
    frames, rows, columns = grid
    count, height, width = mask.shape
    step, rest = divmod(count - 1, max(1, frames - 1))
    if rest or height % rows or width % columns or count < frames:
        raise ValueError(f"mask {mask.shape} does not divide into grid {grid}")
    groups = [mask[:1], *(mask[1 + i * step : 1 + (i + 1) * step] for i in range(frames - 1))]
    each = np.stack([group.mean(0) for group in groups])
    return each.reshape(frames, rows, height // rows, columns, width // columns).mean((2, 4))


def mask_prior(text: str, mask: np.ndarray, grid: tuple[int, int, int]) -> MotionPrior:
    """Return the prior in which every content word of ``text`` attends to ``mask`` (n, h, w) only.

    Raises:
        ValueError: the text has no content word; the sizes do not divide.
    """
    spans = _content_words(text)
    if not spans:
        raise ValueError(f"text {text!r} has no word that speaks of an object")
    cells = grid_mask(mask, grid)
    return prior_of_rows(text, spans, [cells] * len(spans), grid, len(mask))


def looks_prior(text: str, scene: Scene, masks: np.ndarray, grid: tuple[int, int, int]) -> MotionPrior | None:
    """Return the prior in which every content word attends to its object; None if no word has an object.

    The object of a colour or shape is the one that has it. The object of any other word is the last one named
    before it in its sentence, or else the first one named after it.

    Args:
        text: question and answer, of several sentences.
        scene: what is in the picture.
        masks: (objects, n, h, w) float32 in [0, 1], the coverage of each of ``scene``'s objects.
        grid: (F, H, W), the cells of the prior.
    """
    named = {look: i for i, obj in enumerate(scene.objects) for look in (obj.colour, obj.shape)}
    spans, maps = [], []
    for sentence in re.finditer(r"[^?.]+", text):
        words = [(a + sentence.start(), b + sentence.start()) for a, b in _content_words(sentence.group())]
        objects = [named.get(text[slice(*span)].lower()) for span in words]
        for i, span in enumerate(words):
            before = [o for o in objects[: i + 1] if o is not None]
            after = [o for o in objects[i:] if o is not None]
            if before or after:
                spans.append(span)
                maps.append(grid_mask(masks[before[-1] if before else after[0]], grid))
    return prior_of_rows(text, spans, maps, grid, masks.shape[1]) if spans else None


def _content_words(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in re.finditer(r"\w+", text) if word_class(m.group()) != "function"]


def prior_of_rows(
    text: str,
    spans: list[tuple[int, int]],
    maps: list[np.ndarray],
    grid: tuple[int, int, int],
    frames: int,
) -> MotionPrior:
    """The prior with a map (S or F, H, W) for each of ``spans``, fully confident."""
    tokens = [text[slice(*span)] for span in spans]
    return MotionPrior(
        attention=torch.from_numpy(np.stack(maps).reshape(len(spans), -1)).half(),
        tokens=tokens,
        spans=spans,
        prompt=text,
        grid=grid,
        heads=[],
        head_scores={},
        all_tokens=tokens,
        all_spans=spans,
        token_scores=[1.0] * len(spans),
        kept=list(range(len(spans))),
        confidence={"concentration": 1.0, "variation": 1.0, "confidence": 1.0},
        teacher="true masks",
        settings=PriorSettings(),
        frames_given=frames,
        frames_used=frames,
    )
