"""Put wrong words into a sentence of the toy world, for a model that learns to correct them."""

from __future__ import annotations

import re

import numpy as np

from motionenhancer.toy.scene import COLOURS, DIRECTIONS, SHAPES

__all__ = ["CHECKED", "mistaken"]

_GROUPS = (tuple(COLOURS), SHAPES, (*DIRECTIONS, "top", "bottom"), ("one", "two", "three"))
_GROUP_OF = {word: group for group in _GROUPS for word in group}

CHECKED = (*_GROUP_OF, "moves", "stays", "still", "hops", "object", "camera")
"""Words that a picture or clip can contradict."""


def mistaken(text: str, rng: np.random.Generator, *, rate: float = 0.35) -> str:
    """Exchange words of ``text`` for others of their kind; all occurrences of a word get the same new word.

    Colours, shapes, sides and directions, and counts change with probability ``rate`` each; "moves left" and
    "stays still" sometimes change places, so that verbs can be wrong too. The number of words stays the
    same. A quarter of the texts are not changed.

    >>> mistaken("The red ring moves left.", np.random.default_rng(1))
    'The red post moves bottom.'
    """
    if rng.random() < 0.25:
        return text
    words = re.findall(r"\w+|\W+", text)
    swapped = {
        word: str(rng.choice(_GROUP_OF[word]))
        for word in dict.fromkeys(words)
        if word in _GROUP_OF and rng.random() < rate
    }
    made = [swapped.get(word, word) for word in words]
    for i in range(len(words) - 2):
        of_camera = i >= 2 and words[i - 2] == "camera"
        if words[i] == "moves" and words[i + 2] in DIRECTIONS and not of_camera and rng.random() < 0.15:
            made[i], made[i + 2] = "stays", "still"
        elif words[i] == "stays" and rng.random() < 0.2:
            made[i], made[i + 2] = "moves", str(rng.choice(list(DIRECTIONS)))
    return "".join(made)
