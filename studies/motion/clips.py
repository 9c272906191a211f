"""Clips of the toy world with a caption of what each object does, as tensors for the captioner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from motionenhancer.toy.language import caption
from motionenhancer.toy.render import Clip, render
from motionenhancer.toy.scene import Scene, sample_scene
from motionenhancer.toy.tokenizers import t5_tokenizer

__all__ = ["GRID", "Clips", "draw", "make_clips"]

#: Apart from any stream that draws clips for the toy's own models.
_STREAM = 7_000_404
GRID = (2, 4, 4)
"""Frames, rows and columns of the captioner's vision tokens: four frames of 8 x 8 pixels each."""


@dataclass(frozen=True)
class Clips:
    """Clips and their captions, encoded once.

    Attributes:
        tubes: (N, S, pixels) float16 in [-1, 1], the pixels of each vision token; S counts the cells of GRID.
        tokens: (N, T) int64, the captions' tokens. All captions have the same number of words.
        texts: the captions.
        spans: of each caption the T tokens' (start, end) characters; the last token, the end, has none.
    """

    tubes: torch.Tensor
    tokens: torch.Tensor
    texts: list[str]
    spans: list[list[tuple[int, int]]]


def draw(seed: int, split: str, index: int) -> tuple[Scene, Clip]:
    """Draw a clip of three objects, two of which move, each in a direction of its own.

    The objects come in an order drawn at random, so that an object's place in the caption does not tell what
    it does. The pairs of colour and shape of "train" and "test" differ.
    """
    rng = np.random.default_rng([_STREAM, seed, split == "test", index])
    scene = sample_scene(rng, "MR", split=split)
    scene = Scene(tuple(scene.objects[i] for i in rng.permutation(len(scene.objects))), scene.ground)
    return scene, render(scene)


def _tubes(frames: np.ndarray) -> np.ndarray:
    """Cut the last frames of a (n, height, width, 3) clip into (S, pixels)."""
    count, rows, columns = GRID
    each, height, width = len(frames) // count, frames.shape[1] // rows, frames.shape[2] // columns
    cells = frames[-count * each :].reshape(count, each, rows, height, columns, width, 3)
    return cells.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count * rows * columns, -1)


def make_clips(seed: int, split: str, count: int) -> Clips:
    """Draw ``count`` clips and encode them."""
    drawn = [draw(seed, split, i) for i in range(count)]
    texts = [caption(scene) for scene, _ in drawn]
    encoded = t5_tokenizer()(texts, return_offsets_mapping=True)
    return Clips(
        torch.from_numpy(np.stack([_tubes(clip.frames) for _, clip in drawn])).half() / 127.5 - 1,
        torch.tensor(encoded["input_ids"]),
        texts,
        encoded["offset_mapping"],
    )
