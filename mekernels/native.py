"""The compiled library: what was built, what loads here, and its functions on torch tensors.

The functions take dense or strided tensors of one device, run on all of torch's threads on the CPU and on the
current stream on CUDA, and know nothing of autograd. Sections refer to the paper "MotionEnhancer" (CVPR 2026,
arXiv 2606.06853).
"""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .native_abi import CPU, CUDA, Library, NativeLoadError

FOLDER = Path(__file__).resolve().parent / "_native"


def build_report() -> dict[str, Any]:
    """What the last build made, what it did not make, and why.

    Returns:
        ``{"abi": int, "cpu": part, "cuda": part}``; a part has ``built`` (bool), ``library`` (file name or None),
        ``why_not`` (text or None), ``compiler`` and ``targets`` (vector levels or GPU architectures). Without any
        build both parts say so.

    Example:
        >>> import mekernels.native
        >>> sorted(mekernels.native.build_report())
        ['abi', 'cpu', 'cuda']
    """
    try:
        return json.loads((FOLDER / "build_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        never = {"built": False, "library": None, "compiler": None, "targets": []}
        never["why_not"] = "never built: run python -m mekernels.build"
        return {"abi": None, "cpu": dict(never), "cuda": dict(never)}


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
    """Vector code in use on the CPU (``"baseline"``, ``"avx2"`` or ``"avx512"``), None without the library."""
    library = _cpu()
    return None if isinstance(library, str) else library.text("mek_cpu_level")


def _library(device: torch.device) -> Library:
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


def _dense(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A float32 tensor of a shape and device, made contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype torch.float32, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value.detach().contiguous()


def _run(name: str, device: torch.device, arguments: list[Any], sizes: list[int]) -> None:
    """Call ``mek_<name>`` or ``mek_cuda_<name>``; ``sizes`` are what the workspace depends on."""
    library = _library(device)
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    if device.type == "cpu":
        library.call(f"mek_{name}", *values, torch.get_num_threads())
        return
    needed = ctypes.c_int64()
    library.call(f"mek_cuda_{name}_workspace", *sizes, ctypes.addressof(needed))
    workspace = torch.empty(max(1, needed.value), dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    library.call(
        f"mek_cuda_{name}", *values, workspace.data_ptr(), workspace.numel(), device.index or 0, stream
    )


def motion_scores(
    diagonal: Tensor, mean_attention: Tensor, square_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal focus, temporal consistency and diagonal saliency of every head (Section 3), in one pass.

    Args:
        diagonal: (H, F, F, P) float32; entry [h, f, g, p] is the pooled attention from (f, p) to (g, p).
        mean_attention: (H,) float32, mean of the head's vision-to-vision block: the threshold tau.
        square_sum: (H,) float32, sum of all squares of that block.

    Returns:
        ``(dfc, tcs, dsr)``, each (H,) float32. DFC is inf where nothing lies off the diagonal, 0 where nothing
        lies on it either. A NaN among a head's inputs makes the scores that depend on it NaN.

    Raises:
        TypeError: an argument is no float32 tensor.
        ValueError: shapes or devices do not fit, or F or P is 0.
        NativeLoadError: there is no library for the device.

    Example:
        >>> import torch
        >>> from mekernels import native
        >>> diagonal = torch.ones(1, 2, 2, 3)
        >>> native.motion_scores(diagonal, torch.tensor([0.5]), torch.tensor([24.0]))
        (tensor([1.]), tensor([2.]), tensor([1.]))
    """
    if not isinstance(diagonal, Tensor):
        raise TypeError(f"diagonal must be a torch.Tensor, got {type(diagonal).__name__}")
    if diagonal.ndim != 4 or diagonal.shape[1] != diagonal.shape[2]:
        raise ValueError(f"diagonal must have shape (H, F, F, P), got {tuple(diagonal.shape)}")
    heads, frames, _, positions = diagonal.shape
    if not frames or not positions:
        raise ValueError(f"diagonal must have F and P of at least 1, got shape {tuple(diagonal.shape)}")
    device = diagonal.device
    diagonal = _dense("diagonal", diagonal, tuple(diagonal.shape), device)
    mean_attention = _dense("mean_attention", mean_attention, (heads,), device)
    square_sum = _dense("square_sum", square_sum, (heads,), device)
    dfc, tcs, dsr = (torch.empty(heads, dtype=torch.float32, device=device) for _ in range(3))
    if heads:
        sizes = [heads, frames, positions]
        _run("motion_scores", device, [diagonal, mean_attention, square_sum, *sizes, dfc, tcs, dsr], sizes)
    return dfc, tcs, dsr
