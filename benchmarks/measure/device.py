"""The device under test: its name, its ceilings, its cache, and a clock that waits for it."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

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


class Times(NamedTuple):
    """Seconds of several calls, one list a call, one entry a round."""

    device: list[list[float]]
    """What the device worked on a call; without ``filled``, from the call until the device was done."""
    host: list[list[float]]
    """What the host took to start a call."""
    filled: bool
    """Whether the device always had work waiting; else its times may contain waiting for the host."""


CYCLES_PER_SECOND = 2e9
"""A little above the clock of a GPU, so that a wait is not shorter than meant."""
MOST_QUEUED = 16
"""Rounds started at once: a queue that is full makes the host wait."""


def queued_seconds(calls: list[Callable[[], Any]], rounds: int) -> Times:
    """Time calls that take turns, each started while the device still works on what came before.

    The device first waits for a while. Meanwhile the host starts all calls of a batch, with an event before
    and after each: the time between the two events then contains no time of the host, however short the call.
    If the device ends its wait before the last call is started (a call waits for the device, or the queue is
    full), the batch is done again with half as many rounds. If one round does not fit either, each call is
    timed by the clock, from an idle device to an idle device. On a CPU both times are those of the clock.

    Args:
        calls: what is timed; warmed up by the caller.
        rounds: how often each is called, at least 1.
    """
    if not on_gpu():
        spent = [[_wall(call) for call in calls] for _ in range(rounds)]
        by_call = [list(times) for times in zip(*spent, strict=True)]
        return Times(by_call, by_call, True)
    found = Times([[] for _ in calls], [[] for _ in calls], True)
    torch.cuda.synchronize()
    expected, batch = sum(_wall(call) for call in calls), MOST_QUEUED
    while (left := rounds - len(found.device[0])) > 0:
        count = min(batch, left)
        one = _batch(calls, count, wait=2 * count * expected + 1e-3)
        if not one.filled and batch == 1:
            return _alone(calls, rounds)
        if not one.filled:
            batch //= 2
            continue
        for kept, new in ((found.device, one.device), (found.host, one.host)):
            for total, times in zip(kept, new, strict=True):
                total += times
    return found


def _alone(calls: list[Callable[[], Any]], rounds: int) -> Times:
    found = Times([[] for _ in calls], [[] for _ in calls], False)
    for _ in range(rounds):
        for call, until_done, until_started in zip(calls, found.device, found.host, strict=True):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            until_started.append(time.perf_counter() - began)
            torch.cuda.synchronize()
            until_done.append(time.perf_counter() - began)
    return found


def _batch(calls: list[Callable[[], Any]], rounds: int, wait: float) -> Times:
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    host: list[list[float]] = [[] for _ in calls]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(wait, 2.0) * CYCLES_PER_SECOND))
    waited = torch.cuda.Event(enable_timing=True)
    waited.record()
    for _ in range(rounds):
        for call, pairs, times in zip(calls, marks, host, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            times.append(_wall(call))
            stop.record()
            pairs.append((start, stop))
    filled = not waited.query()
    torch.cuda.synchronize()
    seconds = [[start.elapsed_time(stop) / 1e3 for start, stop in pairs] for pairs in marks]
    return Times(seconds, host, filled)


def _wall(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


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
    call()
    return sorted(queued_seconds([call], 11).device[0])[5]


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
