"""The compiled libraries: their C interface, the build report, loading, and calls.

The interface is csrc/include/mek.h, described for ctypes.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "_native"

ABI_VERSION = 1
"""The MEK_ABI_VERSION for which this code is written."""

STATUS = {
    0: "MEK_OK",
    1: "MEK_INVALID_ARGUMENT",
    2: "MEK_UNSUPPORTED",
    3: "MEK_OUT_OF_MEMORY",
    4: "MEK_DEVICE_ERROR",
    5: "MEK_INTERNAL",
}
"""Status codes by number."""

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""torch's dtype name → number of the MEK_ dtype."""

# Every pointer is passed as an integer address: tensors give one, and null is 0.
_POINTER = ctypes.c_void_p
_TEXT = ctypes.c_char_p
_I32 = ctypes.c_int32
_I64 = ctypes.c_int64

Signature = tuple[Any, list[Any]]
"""restype and argtypes."""

COMMON: dict[str, Signature] = {
    "mek_abi_version": (_I32, []),
    "mek_last_error": (_TEXT, []),
    "mek_status_name": (_TEXT, [_I32]),
    "mek_compiler": (_TEXT, []),
}
"""Functions of both libraries."""

_VOLUMES = [_I64] * 7  # rows, then frames, height and width in, then out


class Kernel(NamedTuple):
    """The arguments that a CPU function and the CUDA function of the same name share."""

    arguments: list[Any]
    sizes: list[Any] | None = None
    """Sizes on which the CUDA workspace depends; None if there is no workspace."""


KERNELS: dict[str, Kernel] = {
    "motion_scores": Kernel([_POINTER] * 3 + [_I64] * 3 + [_POINTER] * 3, [_I64] * 3),
    "token_motion_scores": Kernel([_POINTER, _I32, *[_I64] * 3, _POINTER], [_I64] * 3),
    "resample_rows": Kernel([_POINTER, *_VOLUMES, _I32, _POINTER, _POINTER], _VOLUMES),
    "resample_rows_backward": Kernel([_POINTER, _POINTER, *_VOLUMES, _I32, _POINTER], _VOLUMES),
    "row_l2": Kernel([_POINTER, _POINTER, _I32, _POINTER, _I64, _I64, _POINTER]),
    "row_l2_backward": Kernel([_POINTER, _POINTER, _I32, *[_POINTER] * 3, _I64, _I64, _POINTER]),
    "align": Kernel(
        [_POINTER, _POINTER, _I32, _POINTER, *_VOLUMES, _I32, _I32, _POINTER, _POINTER], _VOLUMES
    ),
    "align_backward": Kernel([_POINTER, _POINTER, _I64, _I64, _POINTER]),
}
"""``mek_<name>`` adds the number of threads; ``mek_cuda_<name>`` its workspace, a device and a stream."""

CPU: dict[str, Signature] = {
    "mek_cpu_level": (_TEXT, []),
    "mek_cpu_set_level": (_I32, [_TEXT]),
    **{f"mek_{name}": (_I32, [*kernel.arguments, _I32]) for name, kernel in KERNELS.items()},
}
"""Functions of libmek_cpu."""

CUDA: dict[str, Signature] = {"mek_cuda_device_count": (_I32, [_POINTER])}
"""Functions of libmek_cuda."""

for _name, _kernel in KERNELS.items():
    _workspace = [] if _kernel.sizes is None else [_POINTER, _I64]
    CUDA[f"mek_cuda_{_name}"] = (_I32, [*_kernel.arguments, *_workspace, _I32, _POINTER])
    if _kernel.sizes is not None:
        CUDA[f"mek_cuda_{_name}_workspace"] = (_I32, [*_kernel.sizes, _POINTER])


class NativeError(RuntimeError):
    """A call into a native library failed; the message is the library's own."""


class NativeLoadError(NativeError):
    """A native library is missing, has another version, or cannot be loaded."""


class Library:
    """A loaded library whose functions raise instead of returning a status.

    Args:
        path: the shared library.
        table: its functions beside the common ones.

    Raises:
        NativeLoadError: it cannot be loaded, or has another version of the interface.
    """

    def __init__(self, path: str, table: dict[str, Signature]) -> None:
        try:
            self._handle = ctypes.CDLL(path)
        except OSError as error:
            raise NativeLoadError(f"cannot load {path}: {error}") from error
        try:
            version = self._bind("mek_abi_version", COMMON["mek_abi_version"])()
            if version != ABI_VERSION:
                raise NativeLoadError(
                    f"{path} has abi version {version}, this mekernels needs {ABI_VERSION}: "
                    "run python -m mekernels.build"
                )
            self._functions = {name: self._bind(name, one) for name, one in {**COMMON, **table}.items()}
        except AttributeError as error:
            raise NativeLoadError(
                f"{path} lacks a function: {error}: run python -m mekernels.build"
            ) from error

    def _bind(self, name: str, signature: Signature) -> Any:
        function = getattr(self._handle, name)
        function.restype, function.argtypes = signature
        return function

    def text(self, name: str) -> str:
        """Call a function that takes nothing and returns text."""
        return self._functions[name]().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            ValueError: the library says that an argument is wrong.
            MemoryError: it ran out of host memory.
            NativeError: any other failure.
        """
        status = self._functions[name](*arguments)
        if status == 0:
            return
        message = self.text("mek_last_error") or STATUS.get(status, f"status {status}")
        raise {1: ValueError, 3: MemoryError}.get(status, NativeError)(message)


def build_report() -> dict[str, Any]:
    """What the last build built, what it did not build, and why not.

    Returns:
        ``{"abi": int, "cpu": part, "cuda": part}``; a part has ``built`` (bool), ``library`` (file name or
        None), ``why_not`` (text or None), ``compiler`` and ``targets`` (vector levels or GPU architectures).
        Before any build, both parts say so in ``why_not``.

    Example:
        >>> import mekernels.native
        >>> sorted(mekernels.native.build_report())
        ['abi', 'cpu', 'cuda']
    """
    try:
        return json.loads((FOLDER / "build_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        why = "never built: run python -m mekernels.build"
        parts: dict[str, Any] = {
            name: {"built": False, "library": None, "why_not": why, "compiler": None, "targets": []}
            for name in ("cpu", "cuda")
        }
        return {"abi": None, **parts}


def _load(part: str, table: dict[str, Any]) -> Library | str:
    """The library, or the reason why it is missing."""
    report = build_report()[part]
    if not report["built"]:
        return f"not built: {report['why_not']}"
    try:
        return Library(str(FOLDER / report["library"]), table)
    except NativeLoadError as error:
        return str(error)


@cache
def _cpu() -> Library | str:
    library = _load("cpu", CPU)
    level = os.getenv("MEKERNELS_CPU_LEVEL")
    if isinstance(library, Library) and level:
        try:
            library.call("mek_cpu_set_level", level.encode())
        except NativeError as error:
            raise ValueError(
                "MEKERNELS_CPU_LEVEL must be auto, or baseline, avx2 or avx512 if it is built and runs on "
                f"this machine, got {level!r}"
            ) from error
    return library


@cache
def _cuda() -> Library | str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    library = _load("cuda", CUDA)
    if isinstance(library, str):
        return library
    count = ctypes.c_int32()
    try:
        library.call("mek_cuda_device_count", ctypes.addressof(count))
    except RuntimeError as error:
        return str(error)
    return library


def why_not() -> str | None:
    """Why the CPU library cannot be used, None if it can."""
    library = _cpu()
    return library if isinstance(library, str) else None


def available() -> bool:
    """Whether the CPU library is built and loads."""
    return why_not() is None


def cuda_why_not() -> str | None:
    """Why the CUDA library cannot be used, None if it can."""
    library = _cuda()
    return library if isinstance(library, str) else None


def cuda_available() -> bool:
    """Whether the CUDA library is built and loads, and there is a device."""
    return cuda_why_not() is None


def cpu_level() -> str | None:
    """Vector code in use on the CPU: ``"baseline"``, ``"avx2"`` or ``"avx512"``, None without the library."""
    library = _cpu()
    return None if isinstance(library, str) else library.text("mek_cpu_level")


def library_for(device: torch.device) -> Library:
    """The library for tensors of a device.

    Raises:
        NativeLoadError: there is no library; the message gives the reason.
    """
    if device.type not in ("cpu", "cuda"):
        raise NativeLoadError(f"no native library for device {device}, only for cpu and cuda")
    library = _cpu() if device.type == "cpu" else _cuda()
    if isinstance(library, str):
        raise NativeLoadError(f"native library for {device.type}: {library}")
    return library


def address(value: Any) -> Any:
    """A tensor's address, 0 for None, anything else as it is."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else value


def run(name: str, device: torch.device, arguments: Sequence[Any], sizes: Sequence[int] = ()) -> None:
    """Call ``mek_<name>`` on torch's threads, or ``mek_cuda_<name>`` on the current stream.

    Args:
        name: the function without its prefix.
        device: device of all tensors.
        arguments: contiguous tensors, None or numbers, in the order of csrc/include/mek.h.
        sizes: sizes on which the CUDA workspace depends; empty if the function takes no workspace.

    Raises:
        NativeLoadError: there is no library for the device.
        ValueError, MemoryError, NativeError: the library refused the call.
    """
    library = library_for(device)
    values = [address(value) for value in arguments]
    if device.type == "cpu":
        library.call(f"mek_{name}", *values, torch.get_num_threads())
        return
    if sizes:
        needed = ctypes.c_int64()
        library.call(f"mek_cuda_{name}_workspace", *sizes, ctypes.addressof(needed))
        workspace = torch.empty(needed.value, dtype=torch.uint8, device=device)
        values += [workspace.data_ptr(), workspace.numel()]
    stream = torch.cuda.current_stream(device).cuda_stream
    library.call(f"mek_cuda_{name}", *values, device.index, stream)


def device_reasons(device: torch.device) -> list[str]:
    """Why no native kernel can run on tensors of a device."""
    if device.type not in ("cpu", "cuda"):
        return [f"runs on cpu and cuda, the tensors are on {device}"]
    found = why_not() if device.type == "cpu" else cuda_why_not()
    return [f"{device.type} library: {found}"] if found else []


def narrow_float_reasons(**tensors: Tensor) -> list[str]:
    """Why no native kernel can run on these tensors: all must be on one device, with at most 32 bits."""
    found = device_reasons(next(iter(tensors.values())).device)
    for name, value in tensors.items():
        if str(value.dtype).removeprefix("torch.") not in DTYPES:
            found.append(f"{name} must be float32, float16 or bfloat16, is {value.dtype}")
    return found


def machine() -> list[str]:
    """Why no native kernel can run on any device of this machine."""
    cpu, cuda = device_reasons(torch.device("cpu")), device_reasons(torch.device("cuda"))
    return [*cpu, *cuda] if cpu and cuda else []
