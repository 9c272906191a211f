"""Priors without a model: regions of words in the data file, from annotations or a tracker."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import torch

from mekernels import VideoTokens, token_motion_scores

from ..data import Sample
from ..data.masks import decode_mask
from ..data.sample import whole_words
from ..data.video import Video, read_frames
from .confidence import prior_confidence
from .prior import MotionPrior, PriorError
from .prior_settings import PriorSettings
from .reader import Grid, Source
from .requests import PriorRequest

BAD = "region left out"
_KEYS = frozenset(str.split("words span frames times box rle point track"))
_SHAPES = ("box", "rle", "point", "track")

Picture = tuple[int, int]


class Regions(Source):
    """Makes a prior from a sample's `regions`: each word's row is spread evenly over its regions.

    A cell's value is proportional to the share of the cell that the regions cover, and a row sums to one. A
    frame of the grid covers the clip's frames in its part of the clip: frame n of N is at (n + 0.5) / N.

    Args:
        grid: (F, H, W) of the priors.
    """

    options = frozenset({"region_grid"})

    def __init__(self, grid: Grid) -> None:
        self.shape, self.id, self.device = grid, f"regions {grid}", torch.device("cpu")

    @staticmethod
    def check(teacher: str, given: dict[str, Any]) -> None:
        Regions.grid(given)

    @staticmethod
    def grid(given: dict[str, Any]) -> Grid:
        """(F, H, W) of --region_grid; ValueError if it is not a grid."""
        sides = given["region_grid"].lower().split("x")
        if len(sides) != 3 or not all(side.isdecimal() and 1 <= int(side) <= 512 for side in sides):
            raise ValueError(
                f"--region_grid must be FRAMESxHEIGHTxWIDTH like 8x16x16, each from 1 to 512, "
                f"got {given['region_grid']!r}"
            )
        frames, height, width = map(int, sides)
        return frames, height, width

    @classmethod
    def open(cls, teacher: str, given: dict[str, Any], device: torch.device | str) -> Regions:
        return cls(cls.grid(given))

    @classmethod
    def named(cls, teacher: str, given: dict[str, Any]) -> str:
        return cls(cls.grid(given)).id

    @staticmethod
    def said(sample: Sample, source: str) -> str:
        if not sample.regions:
            raise ValueError("the sample has no regions")
        return json.dumps(sample.regions, sort_keys=True)

    def decode(self, request: PriorRequest) -> Video:
        # Only the clip's size, length and times are needed.
        return read_frames(request.video, num_frames=2, min_frames=2)

    def read(
        self, request: PriorRequest, video: Video, settings: PriorSettings
    ) -> tuple[MotionPrior, list[tuple[str, str]]]:
        given, text = json.loads(request.said or "[]"), request.text
        rows: dict[tuple[int, int], torch.Tensor] = {}
        left_out: list[tuple[str, str]] = []
        for number, region in enumerate(given):
            try:
                words, covered = _spans(_checked(region), text), _covered(region, video, self.shape)
            except ValueError as error:
                left_out.append((BAD, f"regions[{number}]: {error}"))
                continue
            for span in words:
                rows[span] = torch.maximum(rows[span], covered) if span in rows else covered
        if not rows:
            first = f", the first: {left_out[0][1]}" if left_out else ""
            raise PriorError(f"none of {len(given)} regions can be used{first}")
        spans = sorted(rows)
        stacked = torch.stack([rows[span].flatten() for span in spans])
        attention = (stacked / stacked.sum(1, keepdim=True)).half()
        tokens = [text[slice(*span)] for span in spans]
        start, frames = float(video.timestamps[0]), self.shape[0]
        prior = MotionPrior(
            attention=attention,
            tokens=tokens,
            spans=spans,
            prompt=text,
            grid=self.shape,
            heads=[],
            head_scores={},
            all_tokens=tokens,
            all_spans=spans,
            token_scores=token_motion_scores(attention.float(), VideoTokens(*self.shape)).tolist(),
            kept=list(range(len(spans))),
            confidence=prior_confidence(attention, self.shape),
            teacher=self.id,
            settings=settings,
            frames_given=video.source_frames,
            frames_used=video.source_frames,
            times=[start + (n + 0.5) / frames * video.duration for n in range(frames)],
        )
        return prior, left_out


def _checked(region: Any) -> dict[str, Any]:
    """Refuse an invalid region: unknown keys, or alternative keys that are given twice or not at all."""
    if not isinstance(region, dict):
        raise ValueError(f"must be an object, got {str(region)[:60]!r}")
    given = {key for key, value in region.items() if value is not None}
    if unknown := given - _KEYS:
        raise ValueError(f"unknown key {min(unknown)!r}; it may have {', '.join(sorted(_KEYS))}")
    for keys, least in ((("words", "span"), 1), (_SHAPES, 1), (("frames", "times"), 0)):
        if not least <= len(given & {*keys}) <= 1:
            wanted = "one" if least else "at most one"
            raise ValueError(f"must have {wanted} of {', '.join(keys)}, has {len(given & {*keys})}")
    return region


def _spans(region: dict[str, Any], text: str) -> list[tuple[int, int]]:
    """Character ranges of the words of a region, one for each word of each occurrence."""
    words, span = region.get("words"), region.get("span")
    if span is not None:
        if not (_numbers(span, 2) and all(n == int(n) for n in span) and 0 <= span[0] < span[1] <= len(text)):
            raise ValueError(f"span must be two places in the {len(text)} characters of the text, got {span}")
        places = [(int(span[0]), int(span[1]))]
    else:
        if not isinstance(words, str) or not words.strip():
            raise ValueError(f"words must be a text, got {words!r}")
        pattern = r"\s+".join(map(re.escape, words.split()))
        places = [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]
        if not places:
            raise ValueError(f"words {words!r} are not in the text {text[:60]!r}")
    found = [(a + start, a + end) for a, b in places for start, end in whole_words(text[a:b])]
    if not found:
        raise ValueError(f"span {span} holds no word")
    return found


def _covered(region: dict[str, Any], video: Video, grid: Grid) -> torch.Tensor:
    """(F, H, W) float64: the share of each cell that the region covers in its frames."""
    picture = video.frames.shape[1:3]
    key = next(key for key in _SHAPES if region.get(key) is not None)
    draw = {"box": _box, "rle": _mask, "point": _point, "track": _point}[key]
    shapes, places = region[key], places_of(region, video)
    several = key == "track" or (isinstance(shapes, list) and any(isinstance(s, list | dict) for s in shapes))
    if several and (not isinstance(shapes, list) or places is None or len(shapes) != len(places)):
        count = len(shapes) if isinstance(shapes, list) else 0
        raise ValueError(
            f"{key} must have one entry for each of its frames or times ({len(places or ())}), has {count}"
        )
    whole = torch.zeros(grid, dtype=torch.float64)
    counts = torch.zeros(grid[0], dtype=torch.float64)
    one = None if several else draw(shapes, picture, grid[1:])
    if places is None:
        places = [(n + 0.5) / grid[0] for n in range(grid[0])]
    for number, place in enumerate(places):
        frame = min(grid[0] - 1, int(place * grid[0]))
        counts[frame] += 1
        if one is not None:
            whole[frame] += one
        elif shapes[number] is not None:
            whole[frame] += draw(shapes[number], picture, grid[1:])
    if not whole.any():
        raise ValueError(f"{key} covers nothing in any frame")
    return whole / counts.clamp(min=1)[:, None, None]


def places_of(region: dict[str, Any], video: Video) -> list[float] | None:
    """Positions of a region's frames in the clip, from 0 to 1; None for the whole clip."""
    frames, times = region.get("frames"), region.get("times")
    if frames is not None:
        given = frames if isinstance(frames, list) else [frames]
        if not given or not _numbers(given) or any(n != int(n) for n in given):
            raise ValueError(f"frames must be whole numbers, got {str(frames)[:60]}")
        count = video.source_frames
        if outside := [n for n in given if not 0 <= n < count]:
            raise ValueError(f"frames must be from 0 to {count - 1} in this clip, got {outside[0]}")
        return [(n + 0.5) / count for n in given]
    if times is not None:
        given = times if isinstance(times, list) else [times]
        if not given or not _numbers(given):
            raise ValueError(f"times must be numbers of seconds, got {str(times)[:60]}")
        start, end = float(video.timestamps[0]), float(video.timestamps[0]) + video.duration
        if outside := [t for t in given if not start <= t <= end]:
            raise ValueError(f"times must be from {start:g} to {end:g} s in this clip, got {outside[0]:g}")
        return [(t - start) / (end - start) for t in given]
    return None


def check_box(box: Any, picture: Picture) -> None:
    """Refuse an invalid box, or a box outside of the picture of (height, width) pixels.

    Raises:
        ValueError: the box is invalid or outside.
    """
    if not _numbers(box, 4) or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, got {str(box)[:60]}")
    if not (box[0] < picture[1] and box[1] < picture[0] and box[2] > 0 and box[3] > 0):
        raise ValueError(f"box {box} lies outside the picture of {picture[1]} x {picture[0]} pixels")


def _box(box: Any, picture: Picture, cells: Picture) -> torch.Tensor:
    check_box(box, picture)
    sides = [
        _overlaps(count, length, np.array([box[axis]]), np.array([box[axis + 2]]))
        for count, length, axis in zip(cells, picture, (1, 0), strict=True)
    ]
    return torch.from_numpy(sides[0] @ sides[1].T)


def _mask(rle: Any, picture: Picture, cells: Picture) -> torch.Tensor:
    mask = decode_mask(rle)
    if mask.shape != tuple(picture):
        raise ValueError(f"rle's size must be {list(picture)}, the picture's size, got {list(mask.shape)}")
    rows, columns = (
        _overlaps(count, length, np.arange(length), np.arange(length) + 1)
        for count, length in zip(cells, picture, strict=True)
    )
    return torch.from_numpy(rows @ mask @ columns.T)


def _point(point: Any, picture: Picture, cells: Picture) -> torch.Tensor:
    if not _numbers(point, 2) or not (0 <= point[0] < picture[1] and 0 <= point[1] < picture[0]):
        size = f"{picture[1]} x {picture[0]}"
        raise ValueError(f"a point must be [x, y] in the picture of {size} pixels, got {str(point)[:60]}")
    covered = torch.zeros(cells, dtype=torch.float64)
    covered[int(point[1] / picture[0] * cells[0]), int(point[0] / picture[1] * cells[1])] = 1
    return covered


def _overlaps(cells: int, length: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(cells, intervals): for a side of `length` pixels, the share of each cell that each interval covers."""
    edges = np.arange(cells + 1) * (length / cells)
    shared = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return shared.clip(min=0) * (cells / length)


def _numbers(given: Any, count: int | None = None) -> bool:
    return (
        isinstance(given, list)
        and (count is None or len(given) == count)
        and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in given)
    )
