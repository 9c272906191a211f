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
    found = []
    for name in backends.table(op):
        try:
            with use_backend(name):
                probe()
        except BackendError:
            continue
        except Exception:
            # A broken backend stays on the list, so that its check refuses it by name.
            pass
        found.append(name)
    try:
        automatic = chosen(probe).get(op)
    except Exception:
        automatic = None
    return [name for name in found if name != automatic]


def on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with every op on one backend."""

    def run(*args: Any) -> Any:
        with use_backend(backend):
            return call(*args)

    return run


def roles(op: str, probe: Callable[[], Any], call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """``call`` as ours, and on every further backend that can run the op."""
    return {OURS: call, **{label(name): on(name, call) for name in others(op, probe)}}
