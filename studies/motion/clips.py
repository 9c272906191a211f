"""Clips of the toy world with a caption of what each object does, as tensors for the captioner."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from motionenhancer.toy.language import caption
from motionenhancer.toy.render import Clip, render
from motionenhancer.toy.scene import Scene, sample_scene
from motionenhancer.toy.tokenizers import t5_tokenizer
from studies.toy.masks import looks_prior

__all__ = ["GRID", "MAP_GRID", "Clips", "Maps", "draw", "make_clips", "words_of"]

#: A separate random stream: no training clip of the toy's models is drawn again.
_STREAM = 7_000_404
GRID = (2, 4, 4)
"""Frames, rows and columns of the captioner's vision tokens: four frames of 8 x 8 pixels each."""
MAP_GRID = (5, 4, 4)
"""Frames, rows and columns of the toy teacher's tokens, and so of all maps."""


@dataclass(frozen=True)
class Maps:
    """One map for each word of each caption, and which words are pulled towards their maps.

    Attributes:
        rows: (N, W, S) float16, not scaled; S counts the cells of MAP_GRID.
        kept: (N, W) bool.
        temperature, loss, normalize: of `motionenhancer.alignment.aligner.align`.
    """

    rows: torch.Tensor
    kept: torch.Tensor
    temperature: float = 1.0
    loss: str = "l2"
    normalize: bool = True


@dataclass(frozen=True)
class Clips:
    """Clips and their captions, encoded once.

    Attributes:
        tubes: (N, S, pixels) float16 in [-1, 1], the pixels of each vision token; S counts the cells of GRID.
        tokens: (N, T) int64, the captions' tokens. All captions have the same number of words.
        texts: the captions.
        spans: for each caption, (start, end) characters of the T tokens; the last token, the end, has none.
        masks: the true mask of each content word's object; other words have no map.
    """

    tubes: torch.Tensor
    tokens: torch.Tensor
    texts: list[str]
    spans: list[list[tuple[int, int]]]
    masks: Maps


def draw(seed: int, split: str, index: int, movers: int = 2) -> tuple[Scene, Clip]:
    """Draw a clip of three objects, one or two of which move, each in its own direction.

    The objects come in an order drawn at random, so that an object's place in the caption does not show what
    it does. The pairs of colour and shape of "train" and "test" differ.
    """
    rng = np.random.default_rng([_STREAM, seed, split == "test", index])
    scene = sample_scene(rng, "MR", split=split, movers=movers)
    scene = Scene(tuple(scene.objects[i] for i in rng.permutation(len(scene.objects))), scene.ground)
    return scene, render(scene)


def _tubes(frames: np.ndarray) -> np.ndarray:
    """Cut the last frames of a (n, height, width, 3) clip into (S, pixels)."""
    count, rows, columns = GRID
    each, height, width = len(frames) // count, frames.shape[1] // rows, frames.shape[2] // columns
    cells = frames[-count * each :].reshape(count, each, rows, height, columns, width, 3)
    return cells.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count * rows * columns, -1)


def words_of(text: str) -> list[tuple[int, int]]:
    """The (start, end) characters of a caption's words."""
    return [found.span() for found in re.finditer(r"\w+", text)]


def make_clips(seed: int, split: str, count: int, movers: int = 2) -> Clips:
    """Draw ``count`` clips and encode them."""
    tubes, texts, rows, kept = [], [], [], []
    for i in range(count):
        scene, clip = draw(seed, split, i, movers)
        text = caption(scene)
        prior, words = looks_prior(text, scene, clip.masks, MAP_GRID), words_of(text)
        assert prior is not None
        where = torch.tensor([words.index(span) for span in prior.spans])
        tubes.append(_tubes(clip.frames))
        texts.append(text)
        rows.append(torch.zeros(len(words), math.prod(MAP_GRID), dtype=torch.float16))
        kept.append(torch.zeros(len(words), dtype=torch.bool))
        rows[-1][where], kept[-1][where] = prior.attention, True
    encoded = t5_tokenizer()(texts, return_offsets_mapping=True)
    return Clips(
        torch.from_numpy(np.stack(tubes)).half() / 127.5 - 1,
        torch.tensor(encoded["input_ids"]),
        texts,
        encoded["offset_mapping"],
        Maps(torch.stack(rows), torch.stack(kept)),
    )
