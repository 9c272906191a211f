"""What happens in one clip of the toy world: objects, how they move, what the camera does.

A scene is pure data, drawn from a seed. :mod:`motionenhancer.toy.render` turns it into frames and
:mod:`motionenhancer.toy.language` into sentences.

No single frame shows what moves: an object's place at the middle of the clip does not depend on its motion,
and colour, shape and motion are drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["COLOURS", "DIRECTIONS", "SHAPES", "TASKS", "Scene", "ToyObject", "sample_scene"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "yellow": (240, 200, 40),
    "white": (244, 244, 240),
    "black": (20, 20, 24),
}
SHAPES: tuple[str, ...] = ("square", "ring", "bar", "post")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
TASKS: dict[str, str] = {
    "MR": "motion recognition",
    "LM": "location-related motion",
    "CM": "camera motion",
    "MO": "motion-related objects",
    "AO": "action order",
    "RC": "repetition count",
}
"""The tasks, by MotionBench's codes."""

TRAVEL = 0.34
"""Distance that an object moves in one direction over the clip, as a share of the frame's side."""
LEG = 0.22
"""Distance that an object moves in each of two successive directions."""
HOP = 0.20
"""Height of a hop."""
PAN = 0.34
"""Distance that the camera moves."""
MOST_HOPS = 3
#: Distance of a moving object from its middle place, to either side, in the scenes of a task.
_MARGIN = {
    "MR": TRAVEL / 2,
    "LM": TRAVEL / 2,
    "CM": PAN / 2,
    "MO": TRAVEL / 2,
    "AO": LEG,
    "RC": 0.0,
}

_PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
#: Every fourth pair, on a diagonal: training shows each colour and each shape with other partners.
_HELD_OUT = {(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class ToyObject:
    """One object of a scene.

    ``motion`` is "still", "hop" or a direction; ``then`` a second direction that follows halfway, or "";
    ``times`` how often it hops, 0 otherwise. ``middle`` is the centre at the middle of the clip (x, y) and
    ``radius`` the half size, as shares of the side. ``phase`` is where a hop begins, in hops; the ``middle``
    of an object that hops is that of its foot.
    """

    shape: str
    colour: str
    motion: str
    middle: tuple[float, float]
    radius: float
    then: str = ""
    times: int = 0
    phase: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def moving(self) -> bool:
        return self.motion != "still"

    def path(self, frames: int) -> np.ndarray:
        """Return (frames, 2) float64: centre x and y as shares of the side, without the camera."""
        t = np.linspace(0.0, 1.0, frames) if frames > 1 else np.full(1, 0.5)
        track = np.tile(np.array(self.middle), (frames, 1))
        if self.motion == "hop":
            track[:, 1] -= HOP * np.abs(np.sin(np.pi * (self.times * t + self.phase)))
        elif self.then:
            before, after = np.minimum(t - 0.5, 0.0) * 2, np.maximum(t - 0.5, 0.0) * 2
            track += LEG * (
                before[:, None] * DIRECTIONS[self.motion] + after[:, None] * DIRECTIONS[self.then]
            )
        elif self.motion in DIRECTIONS:
            track += TRAVEL * (t - 0.5)[:, None] * DIRECTIONS[self.motion]
        return track


@dataclass(frozen=True)
class Scene:
    """A clip's content.

    ``objects[0]`` is the object that the question asks for; ``ground`` seeds the texture of the ground;
    ``camera`` is "still" or the direction of its motion; the whole picture moves in the opposite direction.
    """

    objects: tuple[ToyObject, ...]
    ground: int
    camera: str = "still"

    @property
    def movers(self) -> tuple[ToyObject, ...]:
        return tuple(o for o in self.objects if o.moving)

    def shift(self, frames: int) -> np.ndarray:
        """Return (frames, 2) float64: what the camera adds to every place in the picture."""
        t = np.linspace(0.0, 1.0, frames) if frames > 1 else np.full(1, 0.5)
        way = np.array(DIRECTIONS.get(self.camera, (0.0, 0.0)))
        return -PAN * (t - 0.5)[:, None] * way


def _overlap(a: ToyObject, b: ToyObject) -> bool:
    distance = np.linalg.norm(a.path(25) - b.path(25), axis=1)
    return bool((distance < 1.15 * (a.radius + b.radius)).any())


def _acts(task: str, rng: np.random.Generator, movers: int) -> list[dict[str, Any]]:
    """What the asked object and a second one do."""
    way = str(rng.choice(list(DIRECTIONS)))
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[way]
    sideways = ["up", "down"] if way in ("left", "right") else ["left", "right"]
    if task == "CM":
        return [{"motion": "still"}, {"motion": "still"}]
    if task == "AO":
        return [{"motion": way, "then": str(rng.choice(sideways))}, {"motion": "still"}]
    if task == "RC":
        return [{"motion": "hop", "times": int(rng.integers(1, MOST_HOPS + 1))}, {"motion": "still"}]
    if task == "MR" and movers == 1:
        return [{"motion": way}, {"motion": "still"}]
    if task == "MR":
        return [{"motion": way}, {"motion": str(rng.choice([*sideways, opposite]))}]
    return [{"motion": way}, {"motion": opposite}]


def sample_scene(
    rng: np.random.Generator, task: str | None = None, *, split: str | None = None, movers: int = 2
) -> Scene:
    """Draw a scene about which ``task`` can be asked: three objects, at least one of them still.

    Colours and shapes within a scene are distinct. Objects never touch and stay inside the frame, so every
    sentence about them is true at every frame. For location-related motion the asked object and its opposite
    lie on two sides of the frame's middle.

    Args:
        rng: source of all random numbers.
        task: one of :data:`TASKS`; any by default.
        split: "train" or "test": only the pairs of colour and shape of this split; None: all pairs.
        movers: number of objects that move in a scene of motion recognition, 1 or 2.

    >>> scene = sample_scene(np.random.default_rng(0), "MO")
    >>> len(scene.movers), len(scene.objects)
    (2, 3)
    """
    if task is None:
        task = str(rng.choice(list(TASKS)))
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    pairs = [p for p in _PAIRS if split is None or (p in _HELD_OUT) == (split == "test")]
    acts = [*_acts(task, rng, movers), {"motion": "still"}]
    camera = str(rng.choice(list(DIRECTIONS))) if task == "CM" else "still"
    while True:
        drawn = [pairs[i] for i in rng.permutation(len(pairs))]
        looks: list[tuple[str, str]] = []
        for pair in drawn:
            if all(pair[0] != c and pair[1] != s for c, s in looks):
                looks.append(pair)
        objects: list[ToyObject] = []
        for (colour, shape), act in zip(looks, acts, strict=False):
            hops = act["motion"] == "hop"
            for _ in range(20):
                radius = float(rng.uniform(0.115, 0.13))
                # All moving objects have the same margin, so the middle place does not reveal the motion.
                moves = task == "CM" or act["motion"] != "still"
                edge = radius + 0.01 + (_MARGIN[task] if moves else 0.0)
                x, y = rng.uniform((edge, edge + HOP * hops), (1.0 - edge, 1.0 - edge))
                candidate = ToyObject(
                    shape,
                    colour,
                    middle=(float(x), float(y)),
                    radius=radius,
                    phase=float(rng.uniform()) if hops else 0.0,
                    **act,
                )
                if not any(_overlap(candidate, other) for other in objects):
                    objects.append(candidate)
                    break
        if len(objects) == len(acts) and (task != "LM" or _apart(objects[0], objects[1])):
            return Scene(tuple(objects), int(rng.integers(0, 2**31)), camera)


def _apart(a: ToyObject, b: ToyObject) -> bool:
    """Whether two objects lie on opposite sides of the frame's middle, across their direction."""
    axis = 1 if a.motion in ("left", "right") else 0
    low, high = sorted((a.middle[axis], b.middle[axis]))
    return low < 0.5 - a.radius / 2 and high > 0.5 + a.radius / 2
