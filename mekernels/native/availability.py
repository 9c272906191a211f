"""The compiled library as the ops see it: absent, unable, or ready."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mekernels.native"), ""
    except (ImportError, OSError) as error:
        return None, f"mekernels.native cannot be loaded: {error}"


def module() -> Any:
    """The ctypes bindings; call only where :func:`why_not` or :func:`reasons` is empty."""
    return _load()[0]


def reasons(device: torch.device) -> list[str]:
    """Why no native kernel can run on tensors of a device."""
    loaded, error = _load()
    if loaded is None:
        return [error]
    if device.type not in ("cpu", "cuda"):
        return [f"runs on cpu and cuda, the tensors are on {device}"]
    found = loaded.why_not() if device.type == "cpu" else loaded.cuda_why_not()
    return [f"{device.type} library: {found}"] if found else []


def narrow_float_reasons(**tensors: torch.Tensor) -> list[str]:
    """Why no native kernel can run on these: all must be on its device and of 32 bits or fewer."""
    found = reasons(next(iter(tensors.values())).device)
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            found.append(f"{name} must be float32, float16 or bfloat16, is {value.dtype}")
    return found


def why_not() -> list[str]:
    """Why no native kernel can run on any device of this machine."""
    cpu, cuda = reasons(torch.device("cpu")), reasons(torch.device("cuda"))
    return [*cpu, *cuda] if cpu and cuda else []
