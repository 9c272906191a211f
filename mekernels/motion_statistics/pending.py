"""Maps of earlier updates that wait to be added together, so that the sums are read and written only once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..diagonal_attention.call import Call
from .sums import MAPS, Sums

TENSORS = ("query", "key", "lse")


class Pending:
    """Calls of one layout, kept by reference, and the stream on which they were made.

    Args:
        limit: bytes of memory that the kept tensors may hold between updates.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._calls: list[Call] = []
        self._versions: list[tuple[int, ...]] = []
        self._stream: Any = None

    @property
    def bytes(self) -> int:
        """Bytes of the storages of the kept tensors, each storage counted once."""
        storages = {}
        for tensor in (tensor for call in self._calls for tensor in _tensors(call)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def takes(self, call: Call) -> bool:
        """Whether this call may wait. An inference tensor may not, because it does not count writes to it."""
        return self.limit > 0 and not any(tensor.is_inference() for tensor in _tensors(call))

    def add(self, sums: Sums, call: Call) -> None:
        """Keep a call. First add the kept calls to the sums if there are many or their layout differs."""
        stream = torch.cuda.current_stream(call.query.device) if call.query.is_cuda else None
        if self._calls and (stream != self._stream or _layout(call) != _layout(self._calls[0])):
            self.flush(sums)
        self._calls.append(call)
        self._versions.append(_versions(call))
        self._stream = stream
        if len(self._calls) == MAPS or self.bytes > self.limit:
            self.flush(sums)

    def check(self) -> None:
        """Raise if a kept tensor was overwritten.

        Raises:
            RuntimeError: names the tensor.
        """
        for place, (call, before) in enumerate(zip(self._calls, self._versions, strict=True)):
            for name, old, new in zip(TENSORS, before, _versions(call), strict=True):
                if old != new:
                    raise RuntimeError(
                        f"{name} of an update ({len(self._calls) - place} updates ago) was overwritten in "
                        "place, but MotionStatistics had not added it yet: pass a copy, or make "
                        "MotionStatistics with pending_bytes=0"
                    )

    def flush(self, sums: Sums) -> None:
        """Add all kept calls on the stream of the updates, then drop them.

        Raises:
            RuntimeError: a kept tensor was overwritten.
        """
        if not self._calls:
            return
        self.check()
        first, *more = self._calls
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            backends.dispatch("motion_statistics_update", "triton", sums, first, more)
        self.drop()

    def drop(self) -> None:
        """Drop all kept calls."""
        self._calls, self._versions, self._stream = [], [], None


def _tensors(call: Call) -> tuple[Tensor, ...]:
    return call.query, call.key, call.lse


def _versions(call: Call) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(call))


def _layout(call: Call) -> tuple[Any, ...]:
    """What the maps of one launch have in common. Aligned addresses compile to a different kernel."""
    tensors = [(item.shape, item.stride(), item.dtype, item.data_ptr() % 16 == 0) for item in _tensors(call)]
    return *tensors, *call[len(TENSORS) :]
