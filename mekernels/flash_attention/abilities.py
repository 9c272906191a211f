"""What each attention backend can do, according to the backend's own checks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backends
from .call import Call
from .packages import DIFFERENTIABLE


class _Shape(NamedTuple):
    """A call that a backend may refuse."""

    causal: bool = False
    keys: int = 64
    key_heads: int = 4
    width: int = 64
    value_width: int = 64
    dtype: torch.dtype = torch.float16
    left: int = -1
    softcap: float = 0.0

    def call(self) -> Call:
        query = torch.empty(1, 4, 64, self.width, dtype=self.dtype)
        key, value = (
            torch.empty(1, self.key_heads, self.keys, width, dtype=self.dtype)
            for width in (self.width, self.value_width)
        )
        return Call(query, key, value, 0.125, self.causal, self.left, -1, self.softcap)


ABILITIES = {
    "causal": _Shape(causal=True),
    "causal, other lengths": _Shape(causal=True, keys=80),
    "grouped heads": _Shape(key_heads=2),
    "value width": _Shape(value_width=32),
    "width 256": _Shape(width=256, value_width=256),
    "float32": _Shape(dtype=torch.float32),
    "window": _Shape(left=16),
    "soft cap": _Shape(softcap=8.0),
}
"""The tested calls by name. Each differs in one property from a plain half-precision call."""


def missing() -> dict[str, dict[str, list[str]]]:
    """For each backend and ability, the reasons why the backend lacks it; an empty list if it has it."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, backend in backends.table("flash_attention").items():
        anyway = backend.reasons(_Shape().call())
        found[name] = {
            ability: [reason for reason in backend.reasons(shape.call()) if reason not in anyway]
            for ability, shape in ABILITIES.items()
        }
    return found


def report() -> list[str]:
    """A table as lines of text, and why each "no" in it."""
    found = missing()
    wide = max(map(len, found))
    lines = [f"{'':{wide}}  {'  '.join(ABILITIES)}  lse gradient"]
    own = {n for n, item in backends.table("flash_attention").items() if item.run in DIFFERENTIABLE}
    for name, reasons in found.items():
        cells = [f"{'no' if reasons[ability] else 'yes':{len(ability)}}" for ability in ABILITIES]
        lines.append(f"{name:{wide}}  {'  '.join(cells)}  {'own' if name in own else 'ours'}")
    lines += [
        f"{name}, {ability}: {'; '.join(why)}"
        for name, reasons in found.items()
        for ability, why in reasons.items()
        if why
    ]
    return [
        *lines,
        "lse: natural logarithm with every backend",
        "lse gradient: own is the package's; ours is one more attention with the keys as values",
        "key masks: no backend; flash_attention has no such argument",
    ]
