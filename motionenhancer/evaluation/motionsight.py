"""MotionSight's visual prompts: moving objects in a spotlight, or frames with trails of earlier frames.

A baseline without training (arXiv 2506.01674). Details that the paper leaves open follow its repository:
questions about the camera get trails, all other questions get the spotlight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.clip import Clip
from ..data.question import filled, video_stem
from ..data.sources import open_source
from ..data.video import Video, read_frames
from ..priors.regions import check_box, places_of
from .generate import Asked

PROMPTS = ("none", "spotlight", "trails", "motionsight")
_DIMMED = 0.1
"""Brightness factor outside of the spotlight."""
_MARGIN = 20
"""Margin of the spotlight around the objects, in pixels."""
_SMALL, _ENLARGED = 10, 100
"""Side lengths in pixels. If a side is below the first, both sides are enlarged to at least the second."""
_FAR, _LEAST, _KEPT = 0.3, 3, 0.7
"""Maximum distance from the running centre, as a share of the picture's side; minimum number of boxes of a
segment; share of the running centre that is kept at every frame. A farther centre ends a segment."""
_TRAIL, _DECAY = 7, 0.65
"""Number of frames of a trail, including the shown one, and the weight ratio of an older to a newer frame."""

Box = Sequence[float]


def looks(prompt: str, asked: list[Asked], boxes: Mapping[str, Any], max_pixels: int | None) -> list[Asked]:
    """The questions, each with the change of its clip's frames. A clip without boxes gets trails only.

    Args:
        prompt: one of ``PROMPTS`` except "none".
        asked: questions with their clips.
        boxes: from :func:`read_boxes`.
        max_pixels: maximum pixels of a frame for trails.

    Raises:
        ValueError: boxes belong to no question and no clip.
    """
    given = [boxes.get(a.question.id) or boxes.get(video_stem(a.question.video)) for a in asked]
    if boxes and not any(given):
        raise ValueError("--boxes must name questions or clips of this run; it names none of them")
    found = []
    for item, regions in zip(asked, given, strict=True):
        look: Callable[[Video], Video] | None = None
        if item.video is not None:
            if prompt == "trails" or (prompt == "motionsight" and "CM" in item.question.tasks):
                look = partial(trails, clip=item.video, max_pixels=max_pixels)
            elif regions:
                look = partial(spotlight, regions=regions)
        found.append(replace(item, look=look))
    return found


def read_boxes(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Read boxes of objects: rows of ``regions``, with the ``id`` of a question, or the name of a ``video``.

    Args:
        path: json or jsonl. A region is ``{"box": [x0, y0, x1, y1]}`` in pixels for the whole clip, or has a
            list of boxes and ``frames`` or ``times`` of the same length; a box is null where the object is
            not seen. Further keys are those of a data file and are not read.

    Returns:
        Question's id, or the clip's name without extension, to regions.

    Raises:
        ValueError: the file is not json or jsonl, or a row or region is invalid; the message names it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line, _, row, problem in open_source(path).rows():
        said = f"--boxes {path}, line {line}"
        if problem or not isinstance(row, dict):
            raise ValueError(f"{said}: {problem or 'must be an object'}")
        name, regions = row.get("id") or row.get("video"), row.get("regions")
        if not filled(name) or not isinstance(regions, list) or not all(isinstance(r, dict) for r in regions):
            raise ValueError(f"{said}: needs 'regions', a list of objects, and 'id' or 'video'")
        for region in regions:
            if region.get("box") is None:
                raise ValueError(f"{said}: a region needs 'box', got {', '.join(region) or 'nothing'}")
        found[name if row.get("id") else video_stem(name)] = regions
    return found


def spotlight(video: Video, regions: Sequence[dict[str, Any]]) -> Video:
    """Darken the frame outside of the objects' box.

    In each shown frame, an object has its box of the nearest time. Consecutive frames in which the objects
    stay near form a segment. The box of a segment contains all of its boxes.

    Raises:
        ValueError: a box is outside of the picture, or a frame or time outside of the clip; the message names
            it.
    """
    height, width = video.frames.shape[1:3]
    frames = video.frames.copy()
    for frame, dark, (x0, y0, x1, y1) in zip(
        frames, np.rint(video.frames * _DIMMED), lit(_boxes(video, regions), height, width), strict=True
    ):
        shown = frame[y0:y1, x0:x1].copy()
        frame[:] = dark
        frame[y0:y1, x0:x1] = shown
    return replace(video, frames=frames)


def _boxes(video: Video, regions: Sequence[dict[str, Any]]) -> list[list[Box]]:
    """The boxes of each shown frame."""
    if len(video.timestamps) < 2:
        raise ValueError("--visual_prompt spotlight needs clips of two frames or more")
    times = (video.timestamps - video.timestamps[0]) / video.duration
    found: list[list[Box]] = [[] for _ in times]
    for number, region in enumerate(regions):
        try:
            places, boxes = places_of(region, video), region["box"]
            if places is None:
                places, boxes = [0.0], [boxes]
            if not isinstance(boxes, list) or len(boxes) != len(places):
                raise ValueError("box must have one entry for each of its frames or times")
            for box in boxes:
                if box is not None:
                    check_box(box, video.frames.shape[1:3])
        except ValueError as error:
            raise ValueError(f"--boxes: regions[{number}]: {error}") from None
        # A numbered frame lies in the middle of its time.
        middle = 0.5 / video.source_frames if region.get("frames") is not None else 0.0
        nearest = np.abs(np.asarray(places)[:, None] - times - middle).argmin(0)
        for frame, index in zip(found, nearest, strict=True):
            if boxes[index] is not None:
                frame.append(boxes[index])
    return found


def lit(boxes: Sequence[Sequence[Box]], height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The spotlight box of each frame: around all boxes of its segment, with a margin.

    A frame without boxes gets the first box of the previous frame; before any box, the whole picture.

    >>> lit([[[30, 30, 50, 50]], [[34, 30, 54, 50]]], 100, 200)
    [(10, 10, 74, 70), (10, 10, 74, 70)]
    """
    last: Sequence[Box] = [[0, 0, width, height]]
    here = np.array([width, height]) / 2
    running: np.ndarray | None = None
    segments: list[list[Box]] = []
    of_frame: list[int] = []
    for seen in boxes:
        if seen:
            here, last = np.array([[b[0] + b[2], b[1] + b[3]] for b in seen]).mean(0) / 2, seen[:1]
        far = running is not None and math.dist(here, running) > _FAR * min(height, width)
        if running is None or (far and len(segments[-1]) >= _LEAST):
            segments.append([])
            running = here
        else:
            running = _KEPT * running + (1 - _KEPT) * here
        segments[-1] += seen or last
        of_frame.append(len(segments) - 1)
    whole = [_around(np.array(segment), height, width) for segment in segments]
    return [whole[segment] for segment in of_frame]


def _around(boxes: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    if (high - low).min() < _SMALL:
        middle, sides = (low + high) / 2, np.maximum(high - low, _ENLARGED)
        low, high = middle - sides / 2, middle + sides / 2
    x0, y0 = np.floor(low - _MARGIN).clip(0).astype(int).tolist()
    x1, y1 = np.ceil(high + _MARGIN).clip(None, [width, height]).astype(int).tolist()
    return x0, y0, x1, y1


def trails(video: Video, clip: Path | Clip, max_pixels: int | None) -> Video:
    """Blend each shown frame with the frames before it, at the clip's own frame rate.

    Raises:
        VideoError: the clip cannot be read.
    """
    whole = read_frames(clip, max_pixels=max_pixels)
    shown = np.searchsorted(whole.timestamps, video.timestamps - 1e-9)
    blended = []
    for index in shown.tolist():
        frame = whole.frames[index].astype(np.float32)
        for back in range(min(index + 1, _TRAIL)):
            share = _DECAY ** (back + 1)
            frame += share * (whole.frames[index - back] - frame)
        blended.append(np.rint(frame).astype(np.uint8))
    return replace(video, frames=np.stack(blended))
