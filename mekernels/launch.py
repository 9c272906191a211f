"""Code that all launches of Triton kernels share. It works without triton, to report that triton is missing.

The folder of an op has ``triton.py``, its ``@triton.jit`` functions, and ``plan.py`` with two parts:
functions that turn a call into a :class:`Launch`, the only place where tile sizes are chosen; and
``gates()``, which plans launches for tensors on the meta device at production shapes, for
:mod:`mekernels.resources` to compile and judge. A kernel gets the strides of each tensor as one tuple.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that the kernels read."""


class Shape(NamedTuple):
    """The attention shape of a real model. Kernels are compiled and judged at it."""

    heads: int
    width: int
    frames: int
    positions: int
    text: int

    @property
    def length(self) -> int:
        """Number of all tokens."""
        return self.text + self.frames * self.positions


SHAPES = {
    "CogVideoX-5B": Shape(48, 64, 13, 30 * 45, 226),
    "CogVideoX-1.5-5B": Shape(48, 64, 11, 48 * 85, 226),
    "Wan-14B": Shape(40, 128, 21, 30 * 52, 0),
}


class Target(NamedTuple):
    """The GPU for which a launch is planned."""

    capability: int
    """Compute capability of the compilation: 80 or 90."""
    processors: int
    """Number of multiprocessors."""


TARGETS = {80: Target(80, 108), 90: Target(90, 132)}
"""An A100 and an H100. Launches for the meta device are planned for them."""
_planned = ContextVar("mekernels_target", default=TARGETS[90])


@contextmanager
def planned_for(capability: int) -> Iterator[None]:
    """Plan launches on the meta device for one of :data:`TARGETS`; the default is an H100."""
    token = _planned.set(TARGETS[capability])
    try:
        yield
    finally:
        _planned.reset(token)


def target(device: torch.device) -> Target:
    """The target of launches on a device."""
    if device.type == "cuda":
        return _of_cuda(device)
    return _planned.get() if device.type == "meta" else Target(90, 1)


@functools.cache
def _of_cuda(device: torch.device) -> Target:
    found = torch.cuda.get_device_properties(device)
    return Target(90 if found.major >= 9 else 80, found.multi_processor_count)


class Launch(NamedTuple):
    """A kernel and everything that is needed to run or compile it."""

    kernel: Any
    """The ``@triton.jit`` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Every parameter of the kernel by name, ``tl.constexpr`` ones included."""
    options: dict[str, int]
    """Compiler options: num_warps, num_stages."""


def run(launch: Launch) -> Any:
    """Start a planned kernel on the device of its tensors; an empty grid does nothing.

    Returns:
        The compiled kernel; None for an empty grid and in the interpreter.
    """
    if 0 in launch.grid:
        return None
    device = next(item.device for item in launch.arguments.values() if isinstance(item, Tensor))
    with on(device):
        return launch.kernel[launch.grid](**launch.arguments, **launch.options)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make the device of the tensors the current device, because Triton launches kernels on that one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Place(NamedTuple):
    """Placeholder in a launch for a tensor that each call provides."""

    name: str


Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""


class Plan:
    """Launches that calls of one kind share. The first call compiles them; later calls only start them.

    Args:
        launches: the launches in order; a :class:`Place` stands for each tensor. Triton specializes a kernel
            on dtype and on whether 16 divides the address, so the tensors of all calls must agree in both.
        buffers: name → shape and dtype of tensors that a call allocates and returns.
        scratch: name → shape and dtype of buffers that nothing reads after the last launch. They share one
            allocation; after the first call, addresses in it take the place of tensors.
    """

    def __init__(self, launches: list[Launch], buffers: Buffers, scratch: Buffers | None = None) -> None:
        self.launches, self.buffers = launches, buffers
        self._scratch: dict[str, _Piece] = {}
        self._bytes = 0
        for name, (shape, dtype) in (scratch or {}).items():
            piece = _Piece(self._bytes, torch.Size(shape).numel() * dtype.itemsize, shape, dtype)
            self._scratch[name] = piece
            # Allocators align more strictly than Triton asks for.
            self._bytes = cdiv(piece.offset + piece.size, 256) * 256
        self._started: list[_Starter] = []

    def tensors(self, device: torch.device, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the launches: the given tensors and new buffers."""
        for name, (shape, dtype) in self.buffers.items():
            given[name] = torch.empty(shape, dtype=dtype, device=device)
        return given

    def bound(self, device: torch.device, tensors: dict[str, Tensor]) -> list[Launch]:
        """The launches of one call."""
        held = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        for name, (offset, size, shape, dtype) in self._scratch.items():
            tensors[name] = held[offset : offset + size].view(dtype).view(shape)
        return [
            launch._replace(
                arguments={
                    name: tensors[value.name] if isinstance(value, Place) else value
                    for name, value in launch.arguments.items()
                }
            )
            for launch in self.launches
        ]

    def run(self, device: torch.device, tensors: dict[str, Tensor]) -> None:
        """Start all launches."""
        if not self._started or _hooked():
            compiled = [run(launch) for launch in self.bound(device, tensors)]
            if None not in compiled:
                self._started = [
                    _starter(*pair, self._scratch) for pair in zip(self.launches, compiled, strict=True)
                ]
            return
        if device.type != "cuda":
            self._start(device, 0, tensors)
        elif device.index == torch.cuda.current_device():
            self._start(device, torch._C._cuda_getCurrentRawStream(device.index), tensors)
        else:
            with torch.cuda.device(device):
                self._start(device, torch._C._cuda_getCurrentRawStream(device.index), tensors)

    def _start(self, device: torch.device, stream: int, tensors: dict[str, Tensor]) -> None:
        base = 0
        if self._bytes:
            held = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            base = held.data_ptr()
        for begin, before, end, values, places, pieces in self._started:
            values = values.copy()
            for index, name in places:
                values[index] = tensors[name]
            for index, offset in pieces:
                values[index] = base + offset
            begin(*before, stream, *end, *values)


class _Piece(NamedTuple):
    """A part of the scratch memory, in bytes."""

    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Starter(NamedTuple):
    """Does the work of ``compiled[grid](*values)`` without looking up profiler hooks each time."""

    begin: Any
    grid: tuple[int, ...]
    behind_stream: tuple[Any, ...]
    values: list[Any]
    places: list[tuple[int, str]]
    """Indices of the values that are tensors."""
    pieces: list[tuple[int, int]]
    """Indices of the values in scratch memory, and their offsets in it."""


def _starter(launch: Launch, compiled: Any, scratch: dict[str, _Piece]) -> _Starter:
    values = [launch.arguments[name] for name in launch.kernel.arg_names]
    named = [(index, value.name) for index, value in enumerate(values) if isinstance(value, Place)]
    places = [(index, name) for index, name in named if name not in scratch]
    pieces = [(index, scratch[name].offset) for index, name in named if name in scratch]
    behind = (compiled.function, compiled.packed_metadata, None, None, None)
    return _Starter(compiled.run, (*launch.grid, 1, 1)[:3], behind, values, places, pieces)


def _hooked() -> bool:
    """Whether a profiler listens to launches."""
    runtime = _knobs().runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def machine() -> list[str]:
    """Why this machine can run no Triton kernel."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    if not (interpreted() or torch.cuda.is_available()):
        return ["no CUDA device (with TRITON_INTERPRET=1 triton runs in its interpreter)"]
    return []


def reasons(query: Tensor) -> list[str]:
    """Why a kernel cannot run on tensors like ``query``."""
    found = []
    device = query.device
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        found.append(f"runs on cuda, the tensors are on {device}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        found.append("needs compute capability 8.0 or later")
    if query.dtype not in DTYPES:
        found.append(f"needs float16, bfloat16 or float32, got {query.dtype}")
    if query.dtype == torch.bfloat16 and interpreted():
        found.append("the interpreter of triton multiplies bfloat16 matrices wrongly")
    if query.ndim == 4 and query.shape[3] > 256:
        found.append(f"width {query.shape[3]} is above 256")
    return found


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


def cdiv(value: int, step: int) -> int:
    """Number of steps that cover ``value``."""
    return -(-value // step)


def inner_block(width: int, dtype: torch.dtype) -> int:
    """The part of the head width that a tile holds: at most 64, so a wide head takes several steps."""
    if dtype == torch.float32:
        return 16
    # A head dimension of 80 takes five steps of 16; two steps of 64 would waste most of the second.
    return next((block for block in (64, 32) if width % block == 0), 64 if width % 16 else 16)


def meta_inputs(shape: Shape, dtype: torch.dtype, fold: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and logsumexp of a model on the meta device."""
    query = torch.empty(1, shape.heads, shape.length, shape.width, dtype=dtype, device="meta")
    key = torch.empty(1, shape.heads, fold * shape.length, shape.width, dtype=dtype, device="meta")
    return query, key, torch.empty(1, shape.heads, shape.length, device="meta")
