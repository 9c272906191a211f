"""What a test file wants measured, known before any tensor is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .work import Work

SIZES = ("tiny", "scaled", "real")


@dataclass(frozen=True)
class Plan:
    """A work to build when its turn comes, and the roles to measure."""

    case: str
    roles: tuple[str, ...]
    build: Callable[[], Work]

    def built(self) -> Work:
        """The work; the previous work is freed."""
        if _held.get("plan") is not self:
            _held.clear()
            _held.update(plan=self, work=self.build())
        return _held["work"]


_held: dict = {}


def planned(plans: Callable[[str], list[Plan]]) -> Callable[[Callable], Callable]:
    """Give a test the plans of a size: "tiny", "scaled" or "real"."""

    def mark(function: Callable) -> Callable:
        function.plans = plans  # type: ignore[attr-defined]
        return function

    return mark
