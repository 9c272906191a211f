"""Which backend can run which op here, and every reason why not.

Each op has a table of backends, fastest first. A backend answers a call with the list of reasons why it
cannot take it. ``"auto"`` takes the first backend without reasons; an explicit backend with reasons raises
one error that lists them. ``"reference"`` is the naive mathematics of :mod:`mekernels.reference`, which can
run everything and is never chosen by itself.
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
"""What an op is registered for: the reference is no op."""

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
            if label == "triton" and not reasons and _device(args).type == "cpu":
                # A thousand times slower than all others: it runs only on request.
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


def _device(args: Iterable[Any]) -> torch.device:
    """That of the first tensor, which may lie in a named tuple."""
    first = next(iter(args))
    return first.device if isinstance(first, Tensor) else _device(first)


class Op:
    """An op of ``torch.library``, and for each backend that can be asked for by name a twin of it.

    The backend is no argument: ``mekernels::<name>`` takes the fastest that can run the call,
    ``mekernels::<name>_<backend>`` that backend or none. So a compiled graph, and a backward in whatever
    thread it runs, keep what was chosen.

    A call is carried by named tuples: the schema has their fields, one after the other, and implementations,
    fake and autograd get the tuples.

    Args:
        name: of the op and of its table of backends.
        fake: the op's signature, and its result without values: takes tensors, numbers and named tuples of
            such, each annotated.
        mutates: names of the tensors the op writes to.
        check: raises on values that do not fit; takes the arguments, and is called before any backend.
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
        """Of each argument the named tuple that it is, or None, and where its fields lie among all."""
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
            save: takes the context, the op's arguments and its result. ``ctx.backend`` is the one chosen.
            backward: takes the context and the gradients of the results; returns those of the first inputs,
                as many as have any.
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
        """Run the op on ``backend``, by default the one of :func:`use_backend`."""
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
    """Whether something must see the call as one op: a compiler, a mode, a profiler, a kind of tensor.

    Else the way through the dispatcher would only take the host's time.
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
"""Kinds of arguments of which there is nothing to observe."""


def _named(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _schema(fields: dict[str, Any], result: Any, mutates: Iterable[str]) -> str:
    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in fields.items()]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def exactly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of tensors and more with autocast off: it would round float32 products to half."""
    device = _device(args).type
    if not torch.is_autocast_enabled(device):
        return function(*args, **options)
    with torch.autocast(device, enabled=False):
        return function(*args, **options)


def meet_in_autocast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to the autocast dtype: rotary embeddings may leave one of the two in float32."""
    device = query.device.type
    if query.dtype != key.dtype and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if query.is_floating_point() and key.is_floating_point():
            return query.to(dtype), key.to(dtype)
    return query, key


def by_reference(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a reference function, in float32 for half types: it would round every step of its maps."""
    wide = [
        arg.float() if isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16) else arg
        for arg in args
    ]
    return exactly(function, *wide, **options)
