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


def why_not() -> list[str]:
    """Why no native kernel can run on any device of this machine."""
    cpu, cuda = reasons(torch.device("cpu")), reasons(torch.device("cuda"))
    return [*cpu, *cuda] if cpu and cuda else []
