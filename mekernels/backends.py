"""Which backend can run which op on this machine, and all reasons why not.

Each op has a table of backends, fastest first. A backend answers a call with the list of reasons why it
cannot run it. ``"auto"`` takes the first backend without reasons. A named backend with reasons raises one
error that lists them. ``"reference"`` is the naive mathematics of :mod:`mekernels.reference`; it can run
everything, and ``"auto"`` never chooses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import checks

BACKENDS = ("auto", "reference", "torch", "native", "triton")
CHOICES = tuple(name for name in BACKENDS if name != "reference")
"""The backends for which an op is registered; the reference is not registered as an op."""

ENVIRONMENT = {
    "MEKERNELS_NATIVE": "build: the CPU library: auto, 0, or 1 (fail if it cannot be built)",
    "MEKERNELS_CUDA": "build: the CUDA library: auto, 0, or 1 (fail if it cannot be built)",
    "MEKERNELS_CUDA_ARCHS": "build: GPU architectures, 80;90 by default",
    "MEKERNELS_CXXFLAGS": "build: additional flags of the C++ compiler",
    "CXX": "build: the C++ compiler",
    "CUDACXX": "build: nvcc; else CUDA_HOME, CUDA_PATH and PATH are searched",
    "MAX_JOBS": "build: parallel jobs",
    "TRITON_INTERPRET": "read by triton: 1 runs Triton kernels in its interpreter",
    "OMP_NUM_THREADS": "read by torch and the native library: threads on the CPU",
    "CUDA_VISIBLE_DEVICES": "read by CUDA: the devices that this process sees",
}
"""Every environment variable that changes what runs, and what it does."""

_active: ContextVar[str] = ContextVar("mekernels_backend", default="auto")


class BackendError(RuntimeError):
    """Neither ``"auto"`` nor the named backend can run a call; the message lists every reason."""


def _no_reasons(*args: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of one op."""

    run: Callable[..., Any]
    """Takes the op's arguments."""
    reasons: Callable[..., list[str]]
    """Takes the op's arguments; returns why this backend cannot run them. Cheap: reads no tensor values."""
    machine: Callable[[], list[str]]
    """Returns why this backend cannot run at all on this machine."""


_table: dict[str, dict[str, Backend]] = {}


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    reasons: Callable[..., list[str]] = _no_reasons,
    machine: Callable[[], list[str]] = _no_reasons,
) -> None:
    """Add a backend at the end of an op's table."""
    _table.setdefault(op, {})[name] = Backend(run, reasons, machine)


def ops() -> list[str]:
    """The ops that have a table."""
    return list(_table)


def table(op: str) -> dict[str, Backend]:
    """An op's backends, fastest first."""
    return dict(_table[op])


def active() -> str:
    """The backend that :func:`use_backend` set for this thread or task, else ``"auto"``."""
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
    """All reasons of a backend: those of the machine, or if there are none, those of the call."""
    return backend.machine() or backend.reasons(*args)


def choose(op: str, name: str, *args: Any) -> Callable[..., Any]:
    """The implementation of ``op`` for these arguments.

    Raises:
        BackendError: the named backend cannot run them, or with ``"auto"`` no backend can.
    """
    backends = _table[op]
    if name == "auto":
        refused = []
        for label, backend in backends.items():
            reasons = reasons_of(backend, *args)
            if label == "triton" and not reasons and _device(args).type == "cpu":
                # A thousand times slower than all others: it runs only on request.
                reasons = ["auto does not choose triton's interpreter: ask for backend triton"]
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


def _device(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor, which may be inside a named tuple."""
    first = next(iter(args))
    return first.device if isinstance(first, Tensor) else _device(first)


class Op:
    """An op of ``torch.library``, with one more op for each backend that can be named.

    The backend is not an argument: ``mekernels::<name>`` runs the fastest backend that can take the call, and
    ``mekernels::<name>_<backend>`` runs only that backend. So a compiled graph keeps the chosen backend, and
    so does a backward in any thread.

    Named tuples carry the arguments of a call. The schema lists their fields in order; implementations, fake
    and autograd get the tuples.

    Args:
        name: of the op and of its table of backends.
        fake: gives the op's signature, and its result without values. Its annotated arguments are tensors,
            numbers and named tuples of these.
        mutates: names of the tensors the op writes to.
        check: takes the arguments and raises on values that do not fit. It is called before any backend.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[..., Any],
        *,
        mutates: Iterable[str] = (),
        check: Callable[..., None] = lambda *_: None,
    ) -> None:
        self.name, self._check = name, check
        hints = get_type_hints(fake)
        result = None if hints["return"] is type(None) else hints["return"]
        del hints["return"]
        self._parts: list[tuple[Any, int, int]] = []
        """For each argument: its named tuple or None, and the range of its fields among all fields."""
        fields: dict[str, Any] = {}
        for field, kind in hints.items():
            begin = len(fields)
            fields |= get_type_hints(kind) if _named(kind) else {field: kind}
            self._parts.append((kind if _named(kind) else None, begin, len(fields)))
        self._count = len(fields)
        self._direct: dict[str, Any] = {}
        self._formulas: dict[str, Any] = {}
        schema = _schema(fields, result, mutates)
        self._twins = {choice: self._register(choice, fake, schema, mutates) for choice in CHOICES}

    def _register(self, choice: str, fake: Callable[..., Any], schema: str, mutates: Iterable[str]) -> Any:
        def run(*args: Any) -> Any:
            self._check(*args)
            return dispatch(self.name, choice, *args)

        name = f"mekernels::{self.name}" + ("" if choice == "auto" else f"_{choice}")
        if not mutates:
            self._direct[choice] = run

        def unpacked(*flat: Any) -> Any:
            return run(*self._packed(flat))

        twin = torch.library.custom_op(name, unpacked, mutates_args=mutates, schema=schema)
        twin.register_fake(lambda *flat: fake(*self._packed(flat)))
        return twin

    def _packed(self, flat: Sequence[Any]) -> list[Any]:
        return [flat[begin] if kind is None else kind(*flat[begin:end]) for kind, begin, end in self._parts]

    def differentiable(self, save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
        """Register the gradient.

        Args:
            save: takes the context, the op's arguments and its result. ``ctx.backend`` is the chosen backend.
            backward: takes the context and the gradients of the results; returns the gradients of the first
                inputs, those that have a gradient.
        """
        for choice, twin in self._twins.items():

            def setup_context(ctx: Any, inputs: Any, output: Any, choice: str = choice) -> None:
                ctx.backend = choice
                save(ctx, *self._packed(inputs), output)

            # With a separate setup_context torch would inspect signatures at each call.
            def forward(ctx: Any, *flat: Any, choice: str = choice) -> Any:
                args = self._packed(flat)
                output = self._direct[choice](*args)
                ctx.backend = choice
                save(ctx, *args, output)
                return output

            def formula(ctx: Any, *grads: Any) -> Any:
                found = backward(ctx, *grads)
                return *found, *[None] * (self._count - len(found))

            twin.register_autograd(formula, setup_context=setup_context)
            if choice in self._direct:
                methods = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
                self._formulas[choice] = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run the op on ``backend``, by default the backend of :func:`use_backend`."""
        flat: list[Any] = []
        for value, (kind, _, _) in zip(args, self._parts, strict=True):
            flat += (value,) if kind is None else value
        checks.no_tangents(self.name, flat)
        choice = active() if backend is None else backend
        if choice not in self._direct or _observed(flat):
            return self._twins[choice](*flat)
        if choice in self._formulas and torch.is_grad_enabled():
            return self._formulas[choice].apply(*flat)
        return self._direct[choice](*args)


def _observed(flat: Iterable[Any]) -> bool:
    """Whether a compiler, a mode, a profiler or a tensor subclass must see the call as one op.

    Otherwise the dispatcher is skipped, because it would only cost host time.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, flat))
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, bool, int, float, list, type(None)))
"""Types of arguments that need no observation."""


def _named(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _schema(fields: dict[str, Any], result: Any, mutates: Iterable[str]) -> str:
    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in fields.items()]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def _autocast(device: str) -> bool:
    """Whether autocast is on; it does not know every type of device, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def exactly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function with autocast off, because autocast would round float32 products to half precision."""
    device = _device(args).type
    if not _autocast(device):
        return function(*args, **options)
    with torch.autocast(device, enabled=False):
        return function(*args, **options)


def meet_in_autocast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to the autocast dtype: rotary embeddings may leave one of the two in float32."""
    device = query.device.type
    if query.dtype != key.dtype and _autocast(device):
        dtype = torch.get_autocast_dtype(device)
        if query.is_floating_point() and key.is_floating_point():
            return query.to(dtype), key.to(dtype)
    return query, key


def by_reference(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a reference function, in float32 for half types, so that it does not round every step."""
    wide = [
        arg.float() if isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16) else arg
        for arg in args
    ]
    return exactly(function, *wide, **options)
