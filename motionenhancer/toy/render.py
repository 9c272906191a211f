"""Draw a toy scene as frames, with the boxes and masks of its objects as ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from motionenhancer.toy.scene import COLOURS, Scene

__all__ = ["FRAMES", "SIZE", "Clip", "render"]

FRAMES = 9
"""Frames of a toy clip."""
SIZE = 32
"""Side of its frames, in pixels."""


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    frames: (n, h, w, 3) uint8.
    boxes: (objects, n, 4) float64, x0, y0, x1, y1 in pixels.
    masks: (objects, n, h, w) float32, the share of each pixel that the object covers.
    """

    frames: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how far (x, y) lies outside ``shape`` of half size 1 at the origin; negative is inside."""
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "bar":
        return np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.36)
    if shape == "post":
        return np.maximum(np.abs(x) - 0.36, np.abs(y) - 1.0)
    raise ValueError(f"shape must be one that the toy world knows, got {shape!r}")


def _stretch(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch (a, b, 3) to (height, width, 3) linearly, corners on corners."""
    a, b, _ = grid.shape
    y, x = np.linspace(0, a - 1, height), np.linspace(0, b - 1, width)
    y0, x0 = np.minimum(y.astype(int), a - 2), np.minimum(x.astype(int), b - 2)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    top = grid[y0][:, x0] * (1 - fx) + grid[y0][:, x0 + 1] * fx
    bottom = grid[y0 + 1][:, x0] * (1 - fx) + grid[y0 + 1][:, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _ground(seed: int, height: int, width: int) -> np.ndarray:
    """Return a dull patterned ground, (2 h, 2 w, 3) float64 in 0..255, of which the camera sees a quarter.

    It gets redder to the right and bluer to the bottom, so that a part of a picture shows its place.
    """
    rng = np.random.default_rng(seed)
    base = np.array([128.0, 122.0, 112.0]) + rng.uniform(-6, 6, 3)
    blobs = _stretch(rng.normal(0, 1, (11, 11, 1)).repeat(3, 2), 2 * height, 2 * width) * 4.0
    across, down = np.linspace(-1, 1, 2 * width), np.linspace(-1, 1, 2 * height)
    tint = np.zeros((2 * height, 2 * width, 3))
    tint[:, :, 0] = 80.0 * across[None, :]
    tint[:, :, 2] = 80.0 * down[:, None]
    return np.clip(base + blobs + tint, 0, 255)


def _window(ground: np.ndarray, x: float, y: float, height: int, width: int) -> np.ndarray:
    """Cut (height, width) out of ``ground`` at a fractional corner, linearly."""
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - x0, y - y0
    part = ground[y0 : y0 + height + 1, x0 : x0 + width + 1]
    part = part[:, :-1] * (1 - fx) + part[:, 1:] * fx
    return part[:-1] * (1 - fy) + part[1:] * fy


def render(scene: Scene, *, frames: int = FRAMES, height: int = SIZE, width: int = SIZE) -> Clip:
    """Draw ``scene`` with smooth edges; later objects lie over earlier ones.

    >>> import numpy as np
    >>> from motionenhancer.toy.scene import sample_scene
    >>> clip = render(sample_scene(np.random.default_rng(0)))
    >>> clip.frames.shape, clip.frames.dtype
    ((9, 32, 32, 3), dtype('uint8'))
    """
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    side = float(min(height, width))
    offset = np.array([(width - side) / 2, (height - side) / 2])
    py, px = np.mgrid[0:height, 0:width] + 0.5
    ground, shift = _ground(scene.ground, height, width), scene.shift(frames) * side
    video = np.stack([_window(ground, width / 2 - x, height / 2 - y, height, width) for x, y in shift])
    masks = np.zeros((len(scene.objects), frames, height, width), dtype=np.float32)
    boxes = np.zeros((len(scene.objects), frames, 4))
    for i, obj in enumerate(scene.objects):
        colour = np.array(COLOURS[obj.colour], dtype=np.float64)
        scale = obj.radius * side
        for f, (cx, cy) in enumerate(obj.path(frames) * side + shift + offset):
            mask = np.clip(0.5 - _distance(obj.shape, (px - cx) / scale, (py - cy) / scale) * scale, 0.0, 1.0)
            video[f] += mask[:, :, None] * (colour - video[f])
            masks[:i, f] *= 1.0 - mask
            masks[i, f] = mask
            rows, columns = np.nonzero(mask >= 0.5)
            if len(rows):
                boxes[i, f] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return Clip(np.rint(video).astype(np.uint8), boxes, masks)
