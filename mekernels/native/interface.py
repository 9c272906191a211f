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
_TOKENS = [_POINTER, _I32, *[_I64] * 3, _POINTER]
_VOLUMES = [_I64] * 7  # rows, then frames, height and width in, then out
_RESAMPLE = [_POINTER, *_VOLUMES, _I32, _POINTER, _POINTER]
_RESAMPLE_BACKWARD = [_POINTER, _POINTER, *_VOLUMES, _I32, _POINTER]
_ROW_L2 = [_POINTER, _POINTER, _I32, _POINTER, _I64, _I64, _POINTER]
_ROW_L2_BACKWARD = [_POINTER, _POINTER, _I32, *[_POINTER] * 3, _I64, _I64, _POINTER]
_ALIGN = [_POINTER, _POINTER, _I32, _POINTER, *_VOLUMES, _I32, _I32, _POINTER, _POINTER]
_ALIGN_BACKWARD = [_POINTER, _POINTER, _I64, _I64, _POINTER]

_ON_STREAM = [_I32, _POINTER]  # device, stream
_IN_WORKSPACE = [_POINTER, _I64, *_ON_STREAM]  # workspace, workspace_bytes

CPU: dict[str, Signature] = {
    "mek_cpu_level": (_TEXT, []),
    "mek_cpu_set_level": (_I32, [_TEXT]),
    "mek_motion_scores": (_I32, [*_MOTION, _I32]),
    "mek_token_motion_scores": (_I32, [*_TOKENS, _I32]),
    "mek_resample_rows": (_I32, [*_RESAMPLE, _I32]),
    "mek_resample_rows_backward": (_I32, [*_RESAMPLE_BACKWARD, _I32]),
    "mek_row_l2": (_I32, [*_ROW_L2, _I32]),
    "mek_row_l2_backward": (_I32, [*_ROW_L2_BACKWARD, _I32]),
    "mek_align": (_I32, [*_ALIGN, _I32]),
    "mek_align_backward": (_I32, [*_ALIGN_BACKWARD, _I32]),
}
"""Functions of libmek_cpu."""

CUDA: dict[str, Signature] = {
    "mek_cuda_device_count": (_I32, [_POINTER]),
    "mek_cuda_motion_scores_workspace": (_I32, [_I64, _I64, _I64, _POINTER]),
    "mek_cuda_motion_scores": (_I32, [*_MOTION, *_IN_WORKSPACE]),
    "mek_cuda_token_motion_scores_workspace": (_I32, [_I64, _I64, _I64, _POINTER]),
    "mek_cuda_token_motion_scores": (_I32, [*_TOKENS, *_IN_WORKSPACE]),
    "mek_cuda_resample_rows_workspace": (_I32, [*_VOLUMES, _POINTER]),
    "mek_cuda_resample_rows": (_I32, [*_RESAMPLE, *_IN_WORKSPACE]),
    "mek_cuda_resample_rows_backward_workspace": (_I32, [*_VOLUMES, _POINTER]),
    "mek_cuda_resample_rows_backward": (_I32, [*_RESAMPLE_BACKWARD, *_IN_WORKSPACE]),
    "mek_cuda_row_l2": (_I32, [*_ROW_L2, *_ON_STREAM]),
    "mek_cuda_row_l2_backward": (_I32, [*_ROW_L2_BACKWARD, *_ON_STREAM]),
    "mek_cuda_align_workspace": (_I32, [*_VOLUMES, _POINTER]),
    "mek_cuda_align": (_I32, [*_ALIGN, *_IN_WORKSPACE]),
    "mek_cuda_align_backward": (_I32, [*_ALIGN_BACKWARD, *_ON_STREAM]),
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
