"""The C interface of csrc/include/mek.h as ctypes sees it."""

from __future__ import annotations

import ctypes
from typing import Any

ABI_VERSION = 1
"""MEK_ABI_VERSION this code is written for."""

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
"""Numbers of the MEK_ dtypes by torch's names."""

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

_MOTION = [_POINTER] * 3 + [_I64] * 3 + [_POINTER] * 3
_ON_STREAM = [_POINTER, _I64, _I32, _POINTER]  # workspace, workspace_bytes, device, stream

CPU: dict[str, Signature] = {
    "mek_cpu_level": (_TEXT, []),
    "mek_cpu_set_level": (_I32, [_TEXT]),
    "mek_motion_scores": (_I32, [*_MOTION, _I32]),
}
"""Functions of libmek_cpu."""

CUDA: dict[str, Signature] = {
    "mek_cuda_device_count": (_I32, [_POINTER]),
    "mek_cuda_motion_scores_workspace": (_I32, [_I64, _I64, _I64, _POINTER]),
    "mek_cuda_motion_scores": (_I32, [*_MOTION, *_ON_STREAM]),
}
"""Functions of libmek_cuda."""


class NativeError(RuntimeError):
    """A call into a native library failed; the message is the library's own."""


class NativeLoadError(NativeError):
    """A native library is missing, of another version, or cannot be loaded."""


class Library:
    """A loaded library whose functions raise instead of returning a status.

    Args:
        path: the shared library.
        table: its functions beside the common ones.

    Raises:
        NativeLoadError: it cannot be loaded, or speaks another version of the interface.
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
        """Result of a function that takes nothing and returns text."""
        return self._functions[name]().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            ValueError: the library says that an argument is wrong.
            MemoryError: it ran out of host memory.
            NativeError: anything else.
        """
        status = self._functions[name](*arguments)
        if status == 0:
            return
        message = self.text("mek_last_error") or STATUS.get(status, f"status {status}")
        raise {1: ValueError, 3: MemoryError}.get(status, NativeError)(message)
