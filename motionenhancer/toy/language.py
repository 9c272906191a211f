"""Sentences about a scene, and the text that the tiny tokenizers learn from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from motionenhancer.toy.scene import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Scene, ToyObject

__all__ = ["QUESTION_KINDS", "caption", "corpus", "phrase", "question"]

QUESTION_KINDS: tuple[str, ...] = ("caption", "motion", "object", "still")

_ASK_CAPTION = ("Describe what moves in the video.", "What happens in the video?")
_VERBS = {"grow": "grows", "shrink": "shrinks", "turn": "turns around", "still": "stays still"}


def phrase(obj: ToyObject) -> str:
    """Say what one object does: ``"moves left quickly"``, ``"stays still"``, ``"grows"``."""
    return f"moves {obj.motion} {obj.speed}" if obj.motion in DIRECTIONS else _VERBS[obj.motion]


def caption(scene: Scene) -> str:
    """Describe every object of the scene in one sentence."""
    parts = [f"the {o.name} {phrase(o)}" for o in scene.objects]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def question(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question and its answer, of one of :data:`QUESTION_KINDS`."""
    if kind == "caption":
        return str(rng.choice(_ASK_CAPTION)), caption(scene)
    if kind == "motion":
        obj = scene.objects[int(rng.integers(len(scene.objects)))]
        return f"What does the {obj.name} do?", f"The {obj.name} {phrase(obj)}."
    if kind == "object":
        obj = scene.movers[int(rng.integers(len(scene.movers)))]
        same = [o for o in scene.movers if phrase(o) == phrase(obj)]
        names = " and the ".join(o.name for o in same)
        return f"Which object {phrase(obj)}?", f"The {names}."
    if kind == "still":
        names = " and the ".join(o.name for o in scene.objects if not o.moving)
        return "Which objects stay still?", f"The {names}."
    raise ValueError(f"kind must be one of {QUESTION_KINDS}, got {kind!r}")


def corpus() -> Iterator[str]:
    """Yield sentences that hold every word of the toy world; the same ones every time."""
    phrases = [f"moves {d} {s}" for d in DIRECTIONS for s in SPEEDS] + list(_VERBS.values())
    for i, colour in enumerate(COLOURS):
        for j, shape in enumerate(SHAPES):
            for k in range(3):
                act = phrases[(i * 5 + j * 7 + k * 4) % len(phrases)]
                other = phrases[(i * 3 + j + k * 5 + 1) % len(phrases)]
                yield f"The {colour} {shape} {act} and the {shape} {other}."
                yield f"Which object {act}? The {colour} {shape} and the {colour} {shape}."
                yield f"What does the {colour} {shape} do? Which objects stay still?"
    yield from _ASK_CAPTION
