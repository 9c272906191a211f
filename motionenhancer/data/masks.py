"""Masks as COCO's tools write them: run lengths, plain or as text."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode_mask(rle: Any) -> np.ndarray:
    """Decode a run-length mask of COCO, SAM 2 and pycocotools to (height, width) bool.

    Runs of background and mask alternate, background first, in column-major order.

    Args:
        rle: `{"size": [height, width], "counts": ...}`; counts is a list of runs, or the text that
            pycocotools makes of it.

    Raises:
        ValueError: it is not such a mask, or its runs do not fill its size.

    Example:
        >>> decode_mask({"size": [2, 3], "counts": [1, 2, 3]}).astype(int).tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, list) and len(size) == 2 and all(_whole(n) and n > 0 for n in size)):
        raise ValueError('rle must be {"size": [height, width], "counts": runs}')
    counts = _runs(rle["counts"]) if isinstance(rle.get("counts"), str) else rle.get("counts")
    if not (isinstance(counts, list) and all(_whole(n) and n >= 0 for n in counts)):
        raise ValueError("rle's counts must be runs, a list of whole numbers or COCO's text")
    height, width = size
    if sum(counts) != height * width:
        raise ValueError(f"rle's counts must fill {height} x {width} pixels, they fill {sum(counts)}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _runs(text: str) -> list[int]:
    """Read COCO's text: each character holds five bits of a number, least significant first.

    From the fourth number on, a number is the run minus the run two places before.

    Raises:
        ValueError: a character is not one of COCO's, or the last number is cut.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"rle's counts must not hold {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        # The highest bit of the last five is the sign.
        value -= (bits & 16) << (shift - 4)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("rle's counts end in the middle of a number")
    return runs


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
