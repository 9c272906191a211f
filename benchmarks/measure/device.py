"""The device under test: its name, its ceilings, its cache, and a clock that waits for it."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "diffusers", "pytest-benchmark")


@cache
def device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu() -> bool:
    return device().type == "cuda"


@cache
def name() -> str:
    """What the device calls itself."""
    if on_gpu():
        return torch.cuda.get_device_name(device())
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what runs."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    return found


def clock() -> float:
    """Seconds; on a GPU after all its work is done."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def cache_bytes() -> int:
    """The largest cache, so that inputs can outgrow it."""
    if on_gpu():
        return torch.cuda.get_device_properties(device()).L2_cache_size
    sizes = [64 << 10]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


def event_seconds(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds between CUDA events around every call, the calls taking turns and none waited for."""
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, pairs in zip(calls, marks, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
    torch.cuda.synchronize()
    return [[start.elapsed_time(stop) / 1e3 for start, stop in pairs] for pairs in marks]


@cache
def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and operations a second of large matrix products.

    Both are measured. Exponentials a second are not: 16 a cycle and multiprocessor, as the CUDA programming
    guide states for compute capability 8.0 and 9.0, at the highest clock. Empty on a CPU, where nothing is
    compared with a floor. TF32 stays off: float32 means float32.
    """
    if not on_gpu():
        return {}
    source = torch.randn(1 << 29, device=device())
    target = torch.empty_like(source)
    found = {"bytes_per_second": 2 * source.nbytes / _median(partial(target.copy_, source))}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
        left, right = torch.randn(2, size, size, device=device(), dtype=dtype)
        found[f"{str(dtype)[6:]}_per_second"] = 2 * size**3 / _median(partial(torch.matmul, left, right))
    properties = torch.cuda.get_device_properties(device())
    found["exponentials_per_second"] = 16e3 * properties.multi_processor_count * properties.clock_rate
    return found


def _median(call: Callable[[], Any]) -> float:
    event_seconds([call], 3)
    return sorted(event_seconds([call], 11)[0])[5]


def floor_seconds(moved: float, operations: float, dtype: str, exponentials: float = 0.0) -> float | None:
    """The least time for bytes moved and work done at the device's ceilings; None on a CPU."""
    found = ceilings()
    rate = found.get(f"{dtype}_per_second")
    if not found or rate is None:
        return None
    floors = [moved / found["bytes_per_second"], operations / rate]
    if exponentials:
        floors.append(exponentials / found["exponentials_per_second"])
    return max(floors)
