"""The compiled library: what was built, what loads here and why not, and calls on torch tensors."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interface import CPU, CUDA, Library, NativeLoadError

FOLDER = Path(__file__).resolve().parent.parent / "_native"


def build_report() -> dict[str, Any]:
    """What the last build made, what it did not make, and why.

    Returns:
        ``{"abi": int, "cpu": part, "cuda": part}``; a part has ``built`` (bool), ``library`` (file name or
        None), ``why_not`` (text or None), ``compiler`` and ``targets`` (vector levels or GPU architectures).
        Without any build both parts say so.

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
    """The library, or the reason why there is none."""
    report = build_report()[part]
    if not report["built"]:
        return f"not built: {report['why_not']}"
    try:
        return Library(str(FOLDER / report["library"]), table)
    except NativeLoadError as error:
        return str(error)


@cache
def _cpu() -> Library | str:
    return _load("cpu", CPU)


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
        NativeLoadError: there is none, with the reason.
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
        device: where every tensor is.
        arguments: contiguous tensors, None or numbers, in the order of csrc/include/mek.h.
        sizes: what the CUDA workspace depends on; empty where the function takes none.

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
