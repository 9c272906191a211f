"""Who can run what here, and every reason why not.

Each op has a table of backends, fastest first. A backend answers a call with the list of reasons why it
cannot take it. ``"auto"`` takes the first backend without reasons; an explicit backend with reasons raises
one error that lists them. ``"reference"`` is the naive mathematics of :mod:`mekernels.reference`, which can
run everything and is never chosen by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks

BACKENDS = ("auto", "reference", "torch", "native", "triton")

ENVIRONMENT = {
    "MEKERNELS_NATIVE": "build: auto, 0 or 1 (fail where it cannot be built) for the CPU library",
    "MEKERNELS_CUDA": "build: auto, 0 or 1 (fail where it cannot be built) for the CUDA library",
    "MEKERNELS_CUDA_ARCHS": "build: GPU architectures, 80;90 by default",
    "MEKERNELS_CXXFLAGS": "build: further flags of the C++ compiler",
    "CXX": "build: the C++ compiler",
    "CUDACXX": "build: nvcc; else CUDA_HOME, CUDA_PATH and PATH are searched",
    "MAX_JOBS": "build: parallel jobs",
    "TRITON_INTERPRET": "read by triton: 1 runs Triton kernels in its interpreter",
    "OMP_NUM_THREADS": "read by torch and the native library: threads on the CPU",
    "CUDA_VISIBLE_DEVICES": "read by CUDA: the devices this process sees",
}
"""Every environment variable that changes what runs, and what it does."""

_active: ContextVar[str] = ContextVar("mekernels_backend", default="auto")


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run a call; the message lists every reason."""


def _no_reasons(*args: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of one op."""

    run: Callable[..., Any]
    """Takes the op's arguments."""
    reasons: Callable[..., list[str]]
    """Takes the op's arguments; why this backend cannot run them. Cheap, and reads no tensor values."""
    machine: Callable[[], list[str]]
    """Why this backend can run nothing on this machine."""


_table: dict[str, dict[str, Backend]] = {}


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    reasons: Callable[..., list[str]] = _no_reasons,
    machine: Callable[[], list[str]] = _no_reasons,
) -> None:
    """Add a backend to an op's table, behind those already there."""
    _table.setdefault(op, {})[name] = Backend(run, reasons, machine)


def ops() -> list[str]:
    """The ops that have a table."""
    return list(_table)


def table(op: str) -> dict[str, Backend]:
    """An op's backends, fastest first."""
    return dict(_table[op])


def active() -> str:
    """The backend set by :func:`use_backend` for this thread or task, ``"auto"`` if none is."""
    return _active.get()


def use_backend(name: str) -> AbstractContextManager[None]:
    """Choose the backend of every op inside a ``with`` block, for this thread or asyncio task only.

    Args:
        name: ``"auto"`` (the fastest that can), ``"reference"`` (naive mathematics, whole attention maps),
            ``"torch"`` (composites of torch ops), ``"native"`` (C++ and CUDA library) or ``"triton"``.

    Raises:
        ValueError: at once, on an unknown name. An op raises :class:`BackendError` when the backend cannot
            run it.

    Example:
        >>> import torch, mekernels
        >>> with mekernels.use_backend("torch"):
        ...     loss = mekernels.row_l2_loss(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
        >>> loss
        tensor(2.)
    """
    checks.choice("backend", name, BACKENDS)
    return _scope(name)


@contextmanager
def _scope(name: str) -> Iterator[None]:
    token = _active.set(name)
    try:
        yield
    finally:
        _active.reset(token)


def reasons_of(backend: Backend, *args: Any) -> list[str]:
    """All reasons of a backend: the machine's, or where there are none the call's."""
    return backend.machine() or backend.reasons(*args)


def choose(op: str, name: str, *args: Any) -> Callable[..., Any]:
    """The implementation of ``op`` for these arguments.

    Raises:
        BackendError: the named backend cannot run them, or with ``"auto"`` none can.
    """
    backends = _table[op]
    if name == "auto":
        refused = []
        for label, backend in backends.items():
            reasons = reasons_of(backend, *args)
            if label == "triton" and not reasons and args[0].device.type == "cpu":
                # A thousand times slower than all others: never taken unasked, even where it is switched on.
                reasons = ["its interpreter runs only what asks for it"]
            if not reasons:
                return backend.run
            refused += [f"{label}: {reason}" for reason in reasons]
    elif name in backends:
        refused = reasons_of(backends[name], *args)
        if not refused:
            return backends[name].run
    else:
        refused = [f"{op} has no such implementation, only {', '.join(backends)} and reference"]
    listed = "".join(f"\n  - {reason}" for reason in refused)
    raise BackendError(f"backend {name!r} cannot run mekernels.{op}:{listed}")


def dispatch(op: str, name: str, *args: Any) -> Any:
    """Run ``op`` on the backend :func:`choose` finds."""
    return exactly(choose(op, name, *args), *args)


def exactly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of a tensor and more with autocast off: it would round float32 products to half."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*args, **options)
    with torch.autocast(device, enabled=False):
        return function(*args, **options)


def by_reference(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a reference function, in float32 for half types: it would round every step of its maps."""
    wide = [
        arg.float() if isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16) else arg
        for arg in args
    ]
    return exactly(function, *wide, **options)
