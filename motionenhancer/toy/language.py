"""Sentences about a scene, and the text that the tiny tokenizers learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from motionenhancer.toy.scene import COLOURS, DIRECTIONS, SHAPES, TASKS, Scene, ToyObject

__all__ = ["caption", "corpus", "phrase", "place", "question", "rest", "still_question"]

_COUNT = {1: "one time", 2: "two times", 3: "three times"}
_LOOKS = {"caption": 0.6, "shape": 0.1, "colour": 0.15, "place": 0.15}


def phrase(obj: ToyObject | SimpleNamespace) -> str:
    """Say what one object does: ``"moves left"``, ``"moves left then up"``, ``"hops two times"``."""
    if obj.motion == "still":
        return "stays still"
    if obj.motion == "hop":
        return f"hops {_COUNT[obj.times]}"
    return f"moves {obj.motion} then {obj.then}" if obj.then else f"moves {obj.motion}"


def _join(parts: list[str]) -> str:
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def caption(scene: Scene) -> str:
    """Describe the camera if it moves, and every object of the scene, in one sentence."""
    parts = [f"the {o.name} {phrase(o)}" for o in scene.objects]
    if scene.camera != "still":
        parts.insert(0, f"the camera moves {scene.camera}")
    return _join(parts)


def place(obj: ToyObject, axis: int) -> str:
    """Say on which side of the frame an object is: along x for axis 0, along y for axis 1."""
    names = ("left", "right") if axis == 0 else ("top", "bottom")
    return names[int(obj.path(1)[0, axis] > 0.5)]


def question(scene: Scene, task: str) -> tuple[str, str]:
    """Return the question of one of the six tasks about a scene of this task, and the answer."""
    asked = scene.objects[0]
    if task in ("MR", "AO", "RC"):
        what = {
            "MR": f"What does the {asked.name} do?",
            "AO": f"In which order does the {asked.name} move?",
            "RC": f"How many times does the {asked.name} hop?",
        }[task]
        return what, f"The {asked.name} {phrase(asked)}."
    if task == "LM":
        side = place(asked, 1 if asked.motion in ("left", "right") else 0)
        return (
            f"Where is the object that {phrase(asked)}?",
            f"The object that {phrase(asked)} is at the {side}.",
        )
    if task == "CM":
        return "How does the camera move?", f"The camera moves {scene.camera}."
    if task == "MO":
        return f"Which object {phrase(asked)}?", f"The {asked.colour} one {phrase(asked)}."
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def rest(scene: Scene) -> tuple[str, str]:
    """Return a second question, after the one about the first object, and the answer: what the others do."""
    return "What is in the picture?", caption(replace(scene, objects=scene.objects[1:]))


def still_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question about the middle frame, and the answer; lists go from left to right."""
    kind = str(rng.choice(list(_LOOKS), p=list(_LOOKS.values())))
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    if kind == "caption":
        across = sorted(scene.objects, key=lambda o: o.path(1)[0, 0])
        parts = [f"the {o.name} is at the {place(o, 1)} {place(o, 0)}" for o in across]
        return "What is in the picture?", _join(parts)
    if kind == "shape":
        return f"Which shape is {obj.colour}?", f"The {obj.colour} one is a {obj.shape}."
    corner = f"{place(obj, 1)} {place(obj, 0)}"
    alone = sum(f"{place(o, 1)} {place(o, 0)}" == corner for o in scene.objects) == 1
    if kind == "colour" and alone:
        return f"Which colour is at the {corner}?", f"The {obj.colour} one is at the {corner}."
    return f"Where is the {obj.name}?", f"The {obj.name} is at the {corner}."


def corpus() -> Iterator[str]:
    """Yield sentences with every word of the toy world, in each call the same sentences."""
    phrases = ["stays still", *(f"hops {count}" for count in _COUNT.values())]
    phrases += [f"moves {d}" for d in DIRECTIONS]
    phrases += [f"moves {a} then {b}" for a in DIRECTIONS for b in DIRECTIONS]
    for i, colour in enumerate(COLOURS):
        for j, shape in enumerate(SHAPES):
            for k in range(3):
                act = phrases[(i * 5 + j * 7 + k * 4) % len(phrases)]
                other = phrases[(i * 3 + j + k * 5 + 1) % len(phrases)]
                yield f"The {colour} {shape} {act} and the {shape} {other}."
                yield f"Which object {act}? The {colour} {shape} and the {colour} {shape}."
                yield f"What does the {colour} {shape} do? In which order does the {colour} {shape} move?"
                yield f"How many times does the {colour} {shape} hop? Which shape is {colour}?"
                yield f"Where is the object that {act}? Where is the {colour} {shape}?"
                yield f"The {colour} one is a {shape}. The {colour} one {act}."
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for direction in DIRECTIONS:
        yield f"How does the camera move? The camera moves {direction}."
    for side in ("left", "right"):
        for height in ("top", "bottom"):
            asked = f"What is in the picture? Which colour is at the {height} {side}?"
            yield f"{asked} The object is at the {side}."
