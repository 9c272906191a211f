"""Which backends of an op can run here, and which one ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mekernels import BackendError, backends, use_backend

OURS = "ours"


def label(backend: str) -> str:
    """The role of a backend that is named outright."""
    return "torch composite" if backend == "torch" else f"{backend} backend"


def chosen(call: Callable[[], Any]) -> dict[str, str]:
    """Run ``call``; which backend each op of mekernels ran on."""
    seen: dict[str, str] = {}
    original = backends.choose

    def choose(op: str, name: str, *args: Any) -> Any:
        run = original(op, name, *args)
        seen[op] = next(label for label, item in backends.table(op).items() if item.run is run)
        return run

    backends.choose = choose
    try:
        call()
    finally:
        backends.choose = original
    return seen


def others(op: str, probe: Callable[[], Any]) -> list[str]:
    """Backends of ``op`` that can run ``probe``, without the one that is chosen by itself."""
    automatic = chosen(lambda: _accepted(probe)).get(op)
    return [name for name in backends.table(op) if _accepted(on(name, probe)) and name != automatic]


def _accepted(probe: Callable[[], Any]) -> bool:
    """Whether no backend refuses a call. What else a broken one raises, anything, is left to its check."""
    try:
        probe()
    except BackendError:
        return False
    except Exception:
        return True
    return True


def on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with every op on one backend."""

    def run(*args: Any) -> Any:
        with use_backend(backend):
            return call(*args)

    return run


def roles(op: str, probe: Callable[[], Any], call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """``call`` as ours, and on every further backend that can run the op."""
    return {OURS: call, **{label(name): on(name, call) for name in others(op, probe)}}
