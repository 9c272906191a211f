"""One unit of work at one size, and the ways to do it that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import device

Call = Callable[..., Any]
MOST_COPIES = 16
ROOM = 8 << 30
"""Bytes all copies of the inputs may take."""


@dataclass
class Work:
    """What is done, at which size, by whom, and how each is checked."""

    name: str
    case: str
    make: Callable[[int], tuple[Any, ...]]
    """Inputs from a seed, on the device; each role is called with them."""
    roles: dict[str, Call]
    """Role name to callable. "ours" is what the public functions do by themselves."""
    check: Callable[[str, Any, tuple[Any, ...]], None]
    """Role, result and inputs; raises AssertionError where the result is wrong."""
    dtype: torch.dtype
    length: int
    """Tokens, the x axis of a sweep."""
    moved: float = 0.0
    """Bytes that must be read and written at least."""
    operations: float = 0.0
    """Multiplications and additions that must be done at least."""
    exponentials: float = 0.0
    """Exponentials that must be computed at least."""
    beside: tuple[str, ...] = ()
    """Roles that do other work, for scale; the least bytes and operations are not theirs."""
    op: str | None = None
    """The op of mekernels whose backend is on record."""
    rotate: bool = True
    held: Any = None
    """What must live as long as the work."""
    verified: dict[str, str] = field(default_factory=dict)
    """Role to what its check found wrong, empty where it passed."""

    @cached_property
    def inputs(self) -> list[tuple[Any, ...]]:
        """Several sets of inputs, together larger than the cache."""
        first = self.make(0)
        size = sum(leaf.nbytes for leaf in tree_leaves(first) if isinstance(leaf, Tensor))
        if not self.rotate or not size:
            return [first]
        copies = min(MOST_COPIES, max(2, -(-2 * device.cache_bytes() // size)), max(2, ROOM // size))
        return [first, *(self.make(seed) for seed in range(1, copies))]

    @cached_property
    def shapes(self) -> list[list[int]]:
        """Shapes of one set of inputs."""
        return [list(leaf.shape) for leaf in tree_leaves(self.inputs[0]) if isinstance(leaf, Tensor)]
