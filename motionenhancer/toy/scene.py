"""What happens in one clip of the toy world: objects, how they move, what the camera does.

A scene is pure data, drawn from a seed. :mod:`motionenhancer.toy.render` turns it into frames and
:mod:`motionenhancer.toy.language` into sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["COLOURS", "MOTIONS", "SHAPES", "Scene", "ToyObject", "sample_scene"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 180),
    "orange": (240, 130, 30),
    "white": (244, 244, 240),
    "black": (20, 20, 24),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
MOTIONS: tuple[str, ...] = ("still", *DIRECTIONS, "grow", "shrink", "turn")
"""Everything an object can do; the four directions also carry a speed."""

SPEEDS: dict[str, float] = {"slowly": 0.28, "quickly": 0.5}
"""How far an object travels over the clip, as a share of the frame's side."""


@dataclass(frozen=True)
class ToyObject:
    """One object of a scene.

    ``start`` is the centre in the first frame (x, y) and ``radius`` the half size, as shares of the side.
    """

    shape: str
    colour: str
    motion: str
    speed: str
    start: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def moving(self) -> bool:
        return self.motion != "still"

    def path(self, frames: int) -> np.ndarray:
        """Return (frames, 4) float64: centre x, y and half size (shares of the side), angle (radians)."""
        t = np.linspace(0.0, 1.0, frames)
        track = np.empty((frames, 4))
        dx, dy = DIRECTIONS.get(self.motion, (0.0, 0.0))
        way = SPEEDS[self.speed] * t
        track[:, 0] = self.start[0] + dx * way
        track[:, 1] = self.start[1] + dy * way
        change = {"grow": 0.7, "shrink": -0.45}.get(self.motion, 0.0)
        track[:, 2] = self.radius * (1.0 + change * t)
        track[:, 3] = np.pi * t if self.motion == "turn" else 0.0
        return track


@dataclass(frozen=True)
class Scene:
    """A clip's content; ``ground`` seeds the texture of the ground."""

    objects: tuple[ToyObject, ...]
    ground: int

    @property
    def movers(self) -> tuple[ToyObject, ...]:
        return tuple(o for o in self.objects if o.moving)


def _overlap(a: ToyObject, b: ToyObject) -> bool:
    pa, pb = a.path(9), b.path(9)
    distance = np.hypot(pa[:, 0] - pb[:, 0], pa[:, 1] - pb[:, 1])
    return bool((distance < 1.15 * (pa[:, 2] + pb[:, 2])).any())


def _place(rng: np.random.Generator, shape: str, colour: str, motion: str) -> ToyObject:
    speed = str(rng.choice(list(SPEEDS))) if motion in DIRECTIONS else "slowly"
    radius = float(rng.uniform(0.09, 0.13))
    if motion == "shrink":
        radius *= 1.5
    reach = radius * (1.7 if motion == "grow" else 1.0) * (1.42 if motion == "turn" else 1.0) + 0.02
    low, high = np.full(2, reach), np.full(2, 1.0 - reach)
    travel = np.array(DIRECTIONS.get(motion, (0.0, 0.0))) * SPEEDS[speed]
    low = np.maximum(low, low - travel)
    high = np.minimum(high, high - travel)
    x, y = rng.uniform(low, high)
    return ToyObject(shape, colour, motion, speed, (float(x), float(y)), radius)


def sample_scene(rng: np.random.Generator, *, objects: tuple[int, int] = (2, 3)) -> Scene:
    """Draw a scene of ``objects`` (least, most) objects, at least one of them moving and one still.

    Colours and shapes within a scene are distinct. Objects stay inside the frame and never touch, so every
    sentence about them is true at every frame.
    A turning object is never a circle or a ring, whose turning cannot be seen.

    >>> scene = sample_scene(np.random.default_rng(0))
    >>> len(scene.movers) >= 1 and len(scene.movers) < len(scene.objects)
    True
    """
    least, most = objects
    if not 2 <= least <= most <= len(SHAPES):
        raise ValueError(
            f"objects must be (least, most) with 2 <= least <= most <= {len(SHAPES)}, got {objects}"
        )
    while True:
        count = int(rng.integers(least, most + 1))
        shapes = rng.permutation(SHAPES)[:count]
        colours = rng.permutation(list(COLOURS))[:count]
        movers = int(rng.integers(1, count))
        chosen: list[ToyObject] = []
        for i in range(count):
            options = [m for m in MOTIONS[1:] if m != "turn" or shapes[i] not in ("circle", "ring")]
            motion = str(rng.choice(options)) if i < movers else "still"
            for _ in range(30):
                candidate = _place(rng, str(shapes[i]), str(colours[i]), motion)
                if not any(_overlap(candidate, other) for other in chosen):
                    chosen.append(candidate)
                    break
        if len(chosen) == count:
            order = rng.permutation(count)
            return Scene(tuple(chosen[i] for i in order), int(rng.integers(0, 2**31)))
