"""Capture a language model's attention at chosen rows and columns while it runs its own fast attention.

The chosen entries are computed from the very queries and keys of the language model's self-attention: next to
each call by :func:`mekernels.attention_rows`, or on a CPU for several layers together. The queries of the
chosen rows are taken out first, and their gradient is added to the one that the attention makes of its query.

Under gradient checkpointing the entries leave the checkpointed layer as a side output. What they need for
their own backward (keys and the queries of the chosen rows) is kept outside the checkpoint's bookkeeping, so
the recomputation is the ordinary one, need not know of the capture, and may happen long after it.
"""

from __future__ import annotations

import contextlib
import sys
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
from motionenhancer.students.attention_registry import observe_attention
from motionenhancer.students.keys import AttentionCall, VisibleKeys, read_mask, to_device
from motionenhancer.students.locate import layers_read

__all__ = ["CapturedAttention", "capture_attention"]

PENDING_NUMBERS = 1 << 21
"""Queries and keys of layers that wait on a CPU to be read together; their gradients are as large."""

_REENTRANT = (
    "re-entrant gradient checkpointing silently drops the gradient of captured attention; use "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


@contextlib.contextmanager
def capture_attention(
    model: nn.Module,
    rows: torch.Tensor,
    columns: torch.Tensor | slice,
    *,
    layers: Sequence[int] | str | None = None,
    heads: Sequence[int] | None = None,
    reduce: str = "mean",
) -> Iterator[CapturedAttention]:
    """Capture the language model's attention during one forward of ``model``, mean over its layers and heads.

    Section 4 of the MotionEnhancer paper (CVPR 2026, arXiv 2606.06853) calls it A_VLM. Entries are exact and
    differentiable, whichever of ``eager``, ``sdpa``, ``flash_attention_2`` and ``flex_attention`` the model
    runs, and are those that ``output_attentions=True`` returns under ``eager`` before any attention dropout.
    Padding, packing and sliding windows are honoured as the model's own masks say.

    Args:
        model: a transformers model, bare or wrapped by DDP, FSDP, PEFT or ``torch.compile``. Only its
            language model is read, never a vision tower.
        rows: (B, R) int64, positions of query tokens in the sequence the language model sees; negative
            entries are padding and give rows of zeros. Best on the CPU, wherever the model is: values there
            are checked. Reading them from another device would wait for it, so there a position beyond the
            sequence makes every captured entry NaN.
        columns: (B, C) int64, positions of key tokens, negative entries give columns of zeros, otherwise as
            ``rows``; or a slice of step 1 that all samples share.
        layers: numbers of the layers to read, counted from 0 over all layers of the language model; ``"all"``
            with self-attention; by default all that attend globally, see
            :func:`motionenhancer.students.locate.layers_read`. ``layers`` and ``left_out`` of what is yielded
            say how many were read and left out.
        heads: the query heads to read, by default all.
        reduce: ``"mean"`` over layers and heads, or ``"none"``.

    Yields:
        An object whose ``attention`` is, after the forward, (B, R, C) float32 (float64 for a float64 model);
        with ``reduce="none"`` (B, L, H, R, C), layers and heads in ascending order.
        Reading it earlier, after a forward that failed, or after a second forward is a RuntimeError. It
        stays readable, and its graph valid, after the context has ended.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or dtype; the model has no self-attention
            or an implementation whose masks are unknown; re-entrant gradient checkpointing; during the
            forward, a key-value cache that holds earlier tokens, a mask that cannot be honoured exactly,
            heads split over devices, or a batch or length that does not fit ``rows`` and ``columns``.
        RuntimeError: a capture is already active.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    >>> with capture_attention(model, torch.tensor([[2, 3]]), slice(0, 2)) as captured:
    ...     out = model(input_ids=torch.arange(5)[None])
    >>> captured.attention.shape
    torch.Size([1, 2, 2])
    """
    _check_positions(rows, columns)
    found = layers_read(model, layers)
    if reduce not in ("mean", "none"):
        raise ValueError(f'reduce must be "mean" or "none", got {reduce!r}')
    if heads is not None and (not heads or len(set(heads)) != len(heads) or min(heads) < 0):
        raise ValueError(f"heads must be different numbers of heads, got {list(heads)}")
    _refuse_reentrant(model)
    captured = CapturedAttention(rows, columns, len(found.modules), heads, reduce, found.left_out)
    with observe_attention(found.modules, captured._record):
        try:
            yield captured
        finally:
            captured._forget()


class _Kind(NamedTuple):
    """What layers must share to be read together."""

    device: torch.device
    query: tuple[torch.Size, torch.dtype]
    key: tuple[torch.Size, torch.dtype]
    visible: int
    scale: float | None
    dtype: torch.dtype


class CapturedAttention:
    """The result of a capture; made by :func:`capture_attention`."""

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor | slice,
        layers: int,
        heads: Sequence[int] | None = None,
        reduce: str = "mean",
        left_out: int = 0,
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.layers = layers
        self.heads = None if heads is None else sorted(heads)
        self.reduce = reduce
        self.left_out = left_out
        self._apart: list[torch.Tensor] = []
        self._highest = _highest_position(rows, columns)
        self._seen: set[int] = set()
        self._repeated = False
        self._sum: torch.Tensor | None = None
        self._masks: dict[tuple[int, bool, Any], tuple[Any, VisibleKeys]] = {}
        self._limits: dict[tuple[int, torch.device], tuple[torch.Tensor, dict[str, Any]]] = {}
        self._pending: dict[_Kind, tuple[VisibleKeys, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._numbers = 0
        self._placed: dict[torch.device, list[Any]] = {}
        self._beyond: list[torch.Tensor] = []

    @property
    def attention(self) -> torch.Tensor:
        """(B, R, C), mean over layers and heads, or (B, L, H, R, C); differentiable where the forward was."""
        if self._repeated:
            raise RuntimeError("the model ran more than once inside the capture; give each forward its own")
        if not self._seen:
            raise RuntimeError("no forward of the captured model has run inside the capture")
        if len(self._seen) != self.layers or (self._sum is None and not self._apart):
            raise RuntimeError(
                f"{len(self._seen)} of the language model's {self.layers} attention layers ran inside the "
                "capture: did the forward fail, or the attention implementation change?"
            )
        if self._sum is None:
            attention = torch.stack([read.to(self._apart[0].device) for read in self._apart], 1)
        else:
            attention = self._sum / self.layers
        for beyond in self._beyond:
            attention = attention.masked_fill(beyond.to(attention.device), torch.nan)
        return attention

    def _record(
        self,
        implementation: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        # Inside a backward pass this is a checkpoint's recomputation: the entries were read in the forward.
        if torch._C._current_graph_task_id() != -1:
            return query
        if not torch.is_grad_enabled() and _inside_reentrant_checkpoint():
            raise ValueError(_REENTRANT)
        self._check_call(module, query, key)
        if id(module) in self._seen:
            self._repeated = True
            return query
        rows, columns = self._positions(query.device, query.shape[2])
        call = AttentionCall(module, mask, kwargs, rows, heads=query.shape[1], length=query.shape[2])
        visible = self._visible(implementation, call)
        dtype, scale = _compute_dtype(implementation, module, query), kwargs.get("scaling")
        self._seen.add(id(module))
        with _outside_checkpoint(), torch.autocast(query.device.type, enabled=False):
            query, picked = share_query(query, rows)
            if self.heads is not None:
                picked, key = _chosen_heads(module, picked, key, self.heads)
            places, limits = self._of_picked(visible, query.device, query.shape[2])
            if self.reduce == "none":
                read = _each_head(picked.to(dtype), key.to(dtype), places, columns, scale, limits)
                self._apart.append(read)
                return query
            if visible.explicit is not None or (query.device.type == "cpu" and backends.active() == "auto"):
                self._wait(picked, key, visible, scale, dtype)
            else:
                picked, kept = picked.to(dtype), key.to(dtype)
                read = mekernels.attention_rows(picked, kept, places, columns, softmax_scale=scale, **limits)
                self._add(read)
        if len(self._seen) == self.layers or self._numbers >= PENDING_NUMBERS:
            self._read_pending()
        return query

    def _wait(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        visible: VisibleKeys,
        scale: float | None,
        dtype: torch.dtype,
    ) -> None:
        kind = _Kind(
            query.device, (query.shape, query.dtype), (key.shape, key.dtype), id(visible), scale, dtype
        )
        self._pending.setdefault(kind, (visible, []))[1].append((query, key))
        # Only layers on a CPU gain from waiting.
        self._numbers += query.numel() + key.numel() if query.device.type == "cpu" else PENDING_NUMBERS

    def _read_pending(self) -> None:
        for kind, (visible, layers) in self._pending.items():
            queries, keys = zip(*layers, strict=True)
            length = kind.key[0][2]
            _, columns = self._positions(kind.device, length)
            places, limits = self._of_picked(visible, kind.device, length)
            options = limits | {"softmax_scale": kind.scale, "dtype": kind.dtype}
            with _outside_checkpoint(), torch.autocast(kind.device.type, enabled=False):
                self._add(layer_attention_rows(queries, keys, places, columns, **options))
        self._pending.clear()
        self._numbers = 0

    def _add(self, read: torch.Tensor) -> None:
        self._sum = read if self._sum is None else self._sum + read.to(self._sum.device)

    def _of_picked(
        self, visible: VisibleKeys, device: torch.device, length: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Where the chosen rows are among the picked queries, and the keys that they see."""
        # The masks hold what is visible, so its id is not used again.
        kept = (id(visible), device)
        if kept not in self._limits:
            options = visible.options(device)
            causal, ranges = options.pop("causal", False), options.pop("key_range", None)
            rows, _ = self._positions(device, length)
            places, limits = picked_rows(rows, length, length, causal=causal, key_range=ranges)
            self._limits[kept] = places, options | {"key_range": limits}
        return self._limits[kept]

    def _forget(self) -> None:
        self._masks.clear()
        self._limits.clear()
        self._pending.clear()

    def _check_call(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
        batch, heads, length = query.shape[:3]
        if key.shape[2] != length:
            raise ValueError(
                f"attention can be captured over whole sequences only, got {length} queries for "
                f"{key.shape[2]} keys: run the model without earlier tokens in its key-value cache"
            )
        if batch != self.rows.shape[0]:
            raise ValueError(f"rows must have one entry per sample ({batch}), got {self.rows.shape[0]}")
        if self._highest >= length:
            raise ValueError(f"rows and columns must be below the {length} tokens, got {self._highest}")
        expected = getattr(getattr(module, "config", None), "num_attention_heads", heads)
        if isinstance(expected, int) and expected != heads:
            raise ValueError(
                f"attention must run all {expected} heads on one device to be captured, got {heads}: tensor "
                "and sequence parallelism are not supported"
            )
        if _saves_selected_activations():
            raise ValueError(
                "selective activation checkpointing cannot be combined with captured attention; use "
                "non-re-entrant gradient checkpointing without context_fn"
            )

    def _positions(self, device: torch.device, length: int) -> list[Any]:
        """Rows and columns; positions beyond the sequence that the host did not check become padding."""
        if device not in self._placed:
            self._placed[device] = []
            for positions in (self.rows, self.columns):
                moved: Any = positions
                if isinstance(positions, torch.Tensor):
                    moved = to_device(positions, device)
                if not _read_by_host(positions):
                    beyond = moved >= length
                    self._beyond.append(beyond.any())
                    moved = moved.masked_fill(beyond, -1)
                self._placed[device].append(moved)
        return self._placed[device]

    def _visible(self, implementation: str, call: AttentionCall) -> VisibleKeys:
        # The layers share one mask, so it is examined once; holding it keeps its id from being used again.
        key = (id(call.mask), call.causal, call.kwargs.get("sliding_window"))
        if key not in self._masks:
            visible = read_mask(implementation, call)
            if self.heads is not None and visible.explicit is not None and visible.explicit.shape[1] != 1:
                visible = replace(visible, explicit=visible.explicit[:, self.heads])
            self._masks[key] = (call.mask, visible)
        return self._masks[key][1]


def _chosen_heads(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, heads: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries of some heads, and for each of them its keys."""
    count = query.shape[1]
    if heads[-1] >= count:
        raise ValueError(f"heads must be below the {count} of {type(module).__name__}, got {heads[-1]}")
    index = torch.tensor(heads, device=query.device)
    return query[:, index], key[:, index // (count // key.shape[1])]


def _each_head(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | slice,
    scale: float | None,
    limits: dict[str, Any],
) -> torch.Tensor:
    """(B, H, R, C): the rows of one layer, head by head."""
    options = limits | {"softmax_scale": scale}
    if "mask" not in limits:
        return mekernels.attention_rows(query, key, rows, columns, reduce="none", **options)
    heads = query.shape[1]
    mask, group = options.pop("mask").expand(-1, heads, -1, -1), heads // key.shape[1]
    parts = [
        layer_attention_rows(
            [query[:, h, None]], [key[:, h // group, None]], rows, columns, mask=mask[:, h, None], **options
        )
        for h in range(heads)
    ]
    return torch.stack(parts, 1)


@contextlib.contextmanager
def _outside_checkpoint() -> Iterator[None]:
    """Keep what is saved for backward out of a surrounding checkpoint's list of tensors to recompute."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield


def _compute_dtype(implementation: str, module: nn.Module, query: torch.Tensor) -> torch.dtype:
    """The dtype to which the attention function rounds queries and keys."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if implementation.startswith("flash") and query.dtype == torch.float32:
        return next((m.weight.dtype for m in module.modules() if isinstance(m, nn.Linear)), query.dtype)
    return query.dtype


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        # The class's default is False; a look-up of a missing attribute of a module is slow.
        if vars(module).get("gradient_checkpointing") is True and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant") is True:
                raise ValueError(_REENTRANT)


def _inside_reentrant_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _saves_selected_activations() -> bool:
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(m).__name__ == "_CachingTorchDispatchMode" for m in _get_current_dispatch_mode_stack())


def _check_positions(rows: Any, columns: Any) -> None:
    for name, positions in (("rows", rows), ("columns", columns)):
        if isinstance(positions, slice) and name == "columns":
            continue
        if not isinstance(positions, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(positions).__name__}")
        if positions.dtype != torch.int64 or positions.dim() != 2:
            found = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"{name} must be (batch, count) int64, got {found}")
    if not isinstance(columns, slice):
        if columns.shape[0] != rows.shape[0]:
            raise ValueError(
                f"columns must have one entry per sample ({rows.shape[0]}), got {columns.shape[0]}"
            )
        return
    start, stop = columns.start or 0, columns.stop
    if columns.step not in (None, 1) or not isinstance(stop, int) or not 0 <= start <= stop:
        raise ValueError(f"columns must be a slice of step 1 with 0 <= start <= stop, got {columns}")


def _read_by_host(positions: torch.Tensor | slice) -> bool:
    """Whether the host checks positions; on another device a check would wait for the device."""
    return isinstance(positions, slice) or positions.device.type == "cpu"


def _highest_position(rows: torch.Tensor, columns: torch.Tensor | slice) -> int:
    """The highest position that is known without a wait for a device."""
    known = [columns.stop - 1] if isinstance(columns, slice) else []
    for positions in (rows, columns):
        if isinstance(positions, torch.Tensor) and _read_by_host(positions) and positions.numel():
            known.append(int(positions.max()))
    return max(known, default=-1)
