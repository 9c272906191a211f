"""Exact peak memory of one call, above what was held before it.

On CUDA the caching allocator's own high-water mark. On the CPU every allocation and release that torch's
allocator makes is recorded by the profiler, those inside operators included, and summed in order. Memory that
the native library takes past torch's allocator is not in it: a few rows of scratch a thread.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import device


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes held at once during ``call``, its result included, above those held when it began."""
    gc.collect()
    if device.on_gpu():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    for _, size in sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree())):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation on the CPU, negative where it is a release."""
    pending = list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.alloc_size
