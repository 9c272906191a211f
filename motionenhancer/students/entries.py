"""The chosen attention entries of one forward, read layer by layer, or several layers together on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import mekernels
from mekernels import backends
from mekernels.attention_rows import picked_rows, share_query
from mekernels.attention_rows.composite import layer_attention_rows

from .attention_registry import ObservedCall
from .keys import AttentionCall, read_mask, to_device
from .locate import attends_locally

PENDING_NUMBERS = 1 << 21
"""Maximum number of values of queries and keys that wait on a CPU, for layers that are read together."""


class _Reading(NamedTuple):
    """Rows, columns and visible keys, which layers with the same masks share."""

    rows: torch.Tensor
    places: torch.Tensor
    """(B, R) indices of the rows among the picked rows, -1 for padding."""
    columns: Any
    limits: dict[str, Any]
    """``mask``, or ``key_mask`` and ``key_range``, for the picked rows."""
    held: tuple[Any, ...]
    """Objects whose ids are in the cache key; they are held so that no id is reused."""


class _Kind(NamedTuple):
    """Properties that layers must share to be read together."""

    query: tuple[torch.Size, torch.dtype]
    key: tuple[torch.Size, torch.dtype]
    reading: int
    scale: float | None
    softcap: float
    sinks: bool
    dtype: torch.dtype


class ForwardEntries:
    """Chosen rows and columns of the attention of one forward.

    Args:
        rows: (B, R) int64 positions among the forward's queries; negative entries are padding.
        columns: (B, C) int64 or a slice, positions of keys.
        layers: number of layers to read.
        heads: ascending numbers of the query heads to read; None for all.
        reduce: ``"mean"`` or ``"none"``.
        tokens: number of tokens so far, including this forward, if a key-value cache may hold earlier tokens.
            Columns are then positions in the whole sequence; columns of later tokens give zeros.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor | slice,
        layers: int,
        heads: Sequence[int] | None,
        reduce: str,
        tokens: int | None = None,
    ) -> None:
        self.rows, self.columns, self.layers = rows, columns, layers
        self.heads, self.reduce, self.tokens = heads, reduce, tokens
        self.seen: set[int] = set()
        self._highest = _highest_position(rows, columns)
        self._length: int | None = None
        self._apart: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None
        self._beyond: dict[torch.device, torch.Tensor] = {}
        self._readings: dict[tuple[Any, ...], _Reading] = {}
        self._pending: dict[_Kind, tuple[_Reading, list[tuple[torch.Tensor | None, ...]]]] = {}
        self._numbers = 0

    @property
    def complete(self) -> bool:
        """Whether every layer has been read."""
        return len(self.seen) == self.layers and (self._sum is not None or bool(self._apart))

    @property
    def attention(self) -> torch.Tensor:
        """(B, R, C) or (B, L, H, R, C), once complete."""
        if self._sum is None:
            attention = torch.stack([read.to(self._apart[0].device) for read in self._apart], 1)
        else:
            attention = self._sum / self.layers
        for beyond in self._beyond.values():
            attention = attention.masked_fill(beyond.to(attention.device), torch.nan)
        return attention

    def read(self, call: ObservedCall) -> torch.Tensor:
        """Read a checked layer; return the query that its attention must use instead of its own."""
        key, sinks = call.key, call.kwargs.get("s_aux")
        scale, cap = call.kwargs.get("scaling"), call.kwargs.get("softcap") or 0.0
        dtype, device = _compute_dtype(call), call.query.device
        with outside_checkpoint(), torch.autocast(device.type, enabled=False):
            reading = self._reading(call)
            self.seen.add(id(call.module))
            query, picked = share_query(call.query, reading.rows)
            if self.heads is not None:
                picked, key, sinks = _chosen_heads(picked, key, sinks, self.heads)
            if self.reduce == "none":
                self._apart.append(_each_head(picked.to(dtype), key.to(dtype), reading, scale, cap, sinks))
            elif "mask" in reading.limits or (device.type == "cpu" and backends.active() == "auto"):
                shapes = (picked.shape, picked.dtype), (key.shape, key.dtype)
                kind = _Kind(*shapes, id(reading), scale, cap, sinks is not None, dtype)
                self._pending.setdefault(kind, (reading, []))[1].append((picked, key, sinks))
                # Only a CPU gains if layers are collected and computed together.
                numbers = picked.numel() + key.numel()
                self._numbers += numbers if device.type == "cpu" else PENDING_NUMBERS
            else:
                picked, key = picked.to(dtype), key.to(dtype)
                options = reading.limits | {"softmax_scale": scale, "softcap": cap or None, "sinks": sinks}
                self._add(mekernels.attention_rows(picked, key, reading.places, reading.columns, **options))
            if len(self.seen) == self.layers or self._numbers >= PENDING_NUMBERS:
                self._read_pending()
        if len(self.seen) == self.layers:
            self.forget()
        return query

    def forget(self) -> None:
        """Release the objects that only the forward needs."""
        self._readings.clear()
        self._pending.clear()

    def _read_pending(self) -> None:
        for kind, (reading, layers) in self._pending.items():
            queries, keys, sinks = zip(*layers, strict=True)
            options = reading.limits | {"softmax_scale": kind.scale, "softcap": kind.softcap}
            options["sinks"] = sinks if kind.sinks else ()
            where = reading.places, reading.columns
            self._add(layer_attention_rows(queries, keys, *where, dtype=kind.dtype, **options))
        self._pending.clear()
        self._numbers = 0

    def _add(self, read: torch.Tensor) -> None:
        self._sum = read if self._sum is None else self._sum + read.to(self._sum.device)

    def check(self, call: ObservedCall) -> None:
        """Refuse a call whose entries would not be the requested ones."""
        (batch, heads, length, _), keys = call.query.shape, call.key.shape[2]
        kind, locally = type(call.module).__name__, attends_locally(call.module, call.kwargs)
        if self.tokens is None:
            if keys != length:
                raise ValueError(
                    f"{kind} must attend to its own whole sequence to be captured, got {length} queries for "
                    f"{keys} keys: run the model without earlier tokens in its key-value cache, or capture "
                    "with rows=None"
                )
            if self._length not in (None, length):
                raise ValueError(
                    f"{kind} attends to {length} tokens, a layer before it to {self._length}: read layers of "
                    "one length at a time"
                )
            self._length = length
            if self._highest >= length:
                raise ValueError(f"rows and columns must be below the {length} tokens, got {self._highest}")
        elif length < self.tokens and length > 1:
            raise ValueError(
                f"rows=None reads one row of a forward, but {length} tokens followed the first forward: "
                "generate one token at a time, without an assistant, prompt look-up or chunks of the prompt"
            )
        elif keys < self.tokens and not locally:
            raise ValueError(
                f"the key-value cache holds {keys} of {self.tokens} tokens, so the positions of its keys "
                "are unknown"
            )
        elif keys > length == self.tokens and locally:
            raise ValueError(
                f"the sliding-window cache of {kind} holds {keys} keys for the first {length} queries, so "
                "the positions of its keys are unknown: begin with an empty dynamic cache, or leave out "
                "such layers"
            )
        for name, positions in (("rows", self.rows), ("columns", self.columns)):
            if isinstance(positions, torch.Tensor) and positions.shape[0] != batch:
                raise ValueError(f"{name} must have one entry per sample ({batch}), got {positions.shape[0]}")
        expected = getattr(getattr(call.module, "config", None), "num_attention_heads", heads)
        if isinstance(expected, int) and expected != heads:
            raise ValueError(
                f"attention must run all {expected} heads on one device to be captured, got {heads}: tensor "
                "and sequence parallelism are not supported"
            )
        if self.heads is not None and self.heads[-1] >= heads:
            raise ValueError(f"heads must be below the {heads} of {kind}, got {self.heads[-1]}")
        if _saves_selected_activations():
            raise ValueError(
                "selective activation checkpointing cannot be combined with captured attention; use "
                "non-re-entrant gradient checkpointing without context_fn"
            )

    def _reading(self, call: ObservedCall) -> _Reading:
        """Return the reading of a call. Masks that layers share are examined only once."""
        (_, heads, length, _), keys, device = call.query.shape, call.key.shape[2], call.query.device
        own = AttentionCall(call.module, call.mask, call.kwargs, self.rows, heads, length, keys)
        held = call.mask, call.kwargs.get("cu_seq_lens_q")
        shared = (*map(id, held), own.causal, call.kwargs.get("sliding_window"), length, keys, device)
        if shared not in self._readings:
            rows = self._placed(self.rows, length, device)
            limits = read_mask(call.implementation, replace(own, rows=rows)).options(device)
            if self.heads is not None and "mask" in limits and limits["mask"].shape[1] != 1:
                limits["mask"] = limits["mask"][:, self.heads]
            causal, ranges = limits.pop("causal", False), limits.pop("key_range", None)
            places, ranges = picked_rows(rows, length, keys, causal=causal, key_range=ranges)
            limits["key_range"] = ranges
            columns = self._columns(keys, device)
            self._readings[shared] = _Reading(rows, places, columns, limits, held)
        return self._readings[shared]

    def _placed(self, positions: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
        """Positions on a device. Unchecked positions beyond the sequence become padding."""
        moved = to_device(positions, device)
        if self.tokens is not None or read_by_host(positions):
            return moved
        beyond = moved >= length
        self._beyond[device] = self._beyond.get(device, beyond.new_zeros(())) | beyond.any()
        return moved.masked_fill(beyond, -1)

    def _columns(self, keys: int, device: torch.device) -> torch.Tensor | slice:
        """Positions of the columns among the keys; a cache may have dropped the first keys."""
        columns, dropped = self.columns, max(0, (self.tokens or 0) - keys)
        if isinstance(columns, slice):
            if not dropped and columns.stop <= keys:
                return columns
            span = torch.arange(columns.start or 0, columns.stop, device=device)
            columns = span.expand(self.rows.shape[0], -1)
        columns = self._placed(columns, keys, device)
        if self.tokens is None:
            return columns
        columns = columns - dropped
        return columns.masked_fill((columns < 0) | (columns >= keys), -1)


def _chosen_heads(
    query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor | None, heads: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The queries and sinks of some heads, and the keys of each of these heads."""
    index = torch.tensor(heads, device=query.device)
    own = key[:, index // (query.shape[1] // key.shape[1])]
    return query[:, index], own, None if sinks is None else sinks[index]


def _each_head(
    query: torch.Tensor,
    key: torch.Tensor,
    reading: _Reading,
    scale: float | None,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(B, H, R, C): the rows of one layer, head by head."""
    where, limits = (reading.places, reading.columns), reading.limits
    if "mask" not in limits:
        options = limits | {"softmax_scale": scale, "softcap": cap or None, "sinks": sinks}
        return mekernels.attention_rows(query, key, *where, reduce="none", **options)
    heads = query.shape[1]
    mask, group = limits["mask"].expand(-1, heads, -1, -1), heads // key.shape[1]
    parts = []
    for h in range(heads):
        one = [query[:, h, None]], [key[:, h // group, None]]
        options = {"mask": mask[:, h, None], "softmax_scale": scale, "softcap": cap}
        own = () if sinks is None else [sinks[h, None]]
        parts.append(layer_attention_rows(*one, *where, sinks=own, **options))
    return torch.stack(parts, 1)


@contextlib.contextmanager
def outside_checkpoint() -> Iterator[None]:
    """Keep tensors that are saved for backward out of the tensors that a checkpoint recomputes."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield


def _compute_dtype(call: ObservedCall) -> torch.dtype:
    """The dtype to which the attention function rounds queries and keys."""
    kind, given = call.query.device.type, call.query.dtype
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if call.implementation.startswith("flash") and given == torch.float32:
        return next((m.weight.dtype for m in call.module.modules() if isinstance(m, nn.Linear)), given)
    return given


def _saves_selected_activations() -> bool:
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(m).__name__ == "_CachingTorchDispatchMode" for m in _get_current_dispatch_mode_stack())


def read_by_host(positions: torch.Tensor | slice) -> bool:
    """Whether the host checks positions. On another device, a check would wait for the device."""
    return isinstance(positions, slice) or positions.device.type == "cpu"


def _highest_position(rows: torch.Tensor, columns: torch.Tensor | slice) -> int:
    """The highest position that is known without waiting for a device."""
    known = [columns.stop - 1] if isinstance(columns, slice) else []
    for positions in (rows, columns):
        if isinstance(positions, torch.Tensor) and read_by_host(positions) and positions.numel():
            known.append(int(positions.max()))
    return max(known, default=-1)
