"""Capture a language model's attention at chosen rows and columns while it runs its own fast attention.

The attention functions of transformers are wrapped where they are registered, for the time of the capture, so
the model's masks stay as they are. Next to each call of the language model's self-attention, the chosen entries
are read from the very queries and keys by :func:`mekernels.attention_rows`.

Under gradient checkpointing the entries leave the checkpointed layer as a side output. What they need for
their own backward (keys and the queries of the chosen rows) is kept outside the checkpoint's bookkeeping, so
the recomputation is the ordinary one, need not know of the capture, and may happen long after it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from motionenhancer.vlm.keys import AttentionCall, VisibleKeys, read_mask
from motionenhancer.vlm.locate import attention_modules
from motionenhancer.vlm.masked_rows import masked_attention_rows

__all__ = ["CapturedAttention", "capture_attention"]

_REENTRANT = (
    "re-entrant gradient checkpointing silently drops the gradient of captured attention; use "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)
_lock = threading.Lock()
_active: CapturedAttention | None = None


@contextlib.contextmanager
def capture_attention(
    model: nn.Module, rows: torch.Tensor, columns: torch.Tensor | slice
) -> Iterator[CapturedAttention]:
    """Capture the language model's attention during one forward of ``model``, mean over its layers and heads.

    Section 4 of the MotionEnhancer paper (CVPR 2026, arXiv 2606.06853) calls it A_VLM. Entries are exact and
    differentiable, whichever of ``eager``, ``sdpa``, ``flash_attention_2`` and ``flex_attention`` the model
    runs, and are those that ``output_attentions=True`` returns under ``eager`` before any attention dropout.
    Padding, packing and sliding windows are honoured as the model's own masks say.

    Parameters
    ----------
    model: a transformers model, bare or wrapped by DDP, FSDP, PEFT or ``torch.compile``. Only its language
        model is read, never a vision tower.
    rows: (B, R) int64, positions of query tokens in the sequence the language model sees; negative entries
        are padding and give rows of zeros.
    columns: (B, C) int64, positions of key tokens, negative entries give columns of zeros; or a slice of
        step 1 that all samples share.

    Yields
    ------
    An object whose ``attention`` is, after the forward, (B, R, C) float32 (float64 for a float64 model).
    Reading it earlier, after a forward that failed, or after a second forward is a RuntimeError. It stays
    readable, and its graph valid, after the context has ended.

    Raises
    ------
    TypeError, ValueError: an argument has a wrong type, shape or dtype; the model has no self-attention or
        an implementation whose masks are unknown; re-entrant gradient checkpointing; during the forward, a
        key-value cache that holds earlier tokens, a mask that cannot be honoured exactly, heads split over
        devices, or a batch or length that does not fit ``rows`` and ``columns``.
    RuntimeError: a capture is already active.

    >>> from motionenhancer.toy.models import make_student
    >>> model, processor = make_student(layers=2)
    >>> ids = processor.tokenizer("The red circle moves left", return_tensors="pt").input_ids
    >>> with capture_attention(model, torch.tensor([[2, 3]]), slice(0, 2)) as captured:
    ...     out = model(input_ids=ids)
    >>> captured.attention.shape
    torch.Size([1, 2, 2])
    """
    global _active
    captured = CapturedAttention(model, rows, columns)
    if not _lock.acquire(blocking=False):
        raise RuntimeError("a capture is already active: captures can be neither nested nor concurrent")
    try:
        with contextlib.ExitStack() as stack:
            for patch in captured._patches():
                stack.enter_context(patch)
            _active = captured
            try:
                yield captured
            finally:
                _active = None
                captured._close()
    finally:
        _lock.release()


class CapturedAttention:
    """What a capture has seen; made by :func:`capture_attention`."""

    def __init__(self, model: nn.Module, rows: torch.Tensor, columns: torch.Tensor | slice) -> None:
        self.rows = _checked_positions("rows", rows)
        self.columns = columns if isinstance(columns, slice) else _checked_positions("columns", columns)
        if isinstance(self.columns, slice):
            _check_slice(self.columns)
        elif self.columns.shape[0] != self.rows.shape[0]:
            raise ValueError(
                f"columns must have as many samples as rows ({self.rows.shape[0]}), got {self.columns.shape[0]}"
            )
        modules = attention_modules(model)
        _refuse_reentrant(model)
        self.layers = len(modules)
        self._modules = {id(module): module for module in modules}
        self._highest = _highest_position(self.rows, self.columns)
        self._seen: set[int] = set()
        self._repeated = False
        self._sum: torch.Tensor | None = None
        self._masks: dict[tuple[int, bool, Any], tuple[Any, VisibleKeys]] = {}

    @property
    def attention(self) -> torch.Tensor:
        """(B, R, C), mean over all layers and heads; differentiable where the forward was."""
        if self._repeated:
            raise RuntimeError(
                "the model ran more than once inside the capture; use one capture for each forward"
            )
        if not self._seen or self._sum is None:
            raise RuntimeError("no forward of the captured model has run inside the capture")
        if len(self._seen) != self.layers:
            raise RuntimeError(
                f"only {len(self._seen)} of the language model's {self.layers} attention layers ran inside the "
                "capture: did the forward fail, or the attention implementation change?"
            )
        return self._sum / self.layers

    def _patches(self) -> list[contextlib.AbstractContextManager[None]]:
        """The registry entries to wrap: one for each implementation and namespace that the modules use."""
        patches: dict[tuple[int, str], contextlib.AbstractContextManager[None]] = {}
        for module in self._modules.values():
            name = getattr(getattr(module, "config", None), "_attn_implementation", None)
            # Attention written before the registry existed, or remote code with its own: nothing to wrap.
            namespace = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
            registry = namespace.get("ALL_ATTENTION_FUNCTIONS")
            if registry is None or name is None:
                raise ValueError(
                    f"model must call transformers' ALL_ATTENTION_FUNCTIONS, {type(module).__name__} does not"
                )
            if name == "eager":
                key = "eager_attention_forward"
                if key not in namespace:
                    raise ValueError(f"model must define {key} next to {type(module).__name__} to run eager")
                patches.setdefault((id(namespace), key), _patched_global(namespace, key, name))
            elif name in registry:
                patches.setdefault((id(registry), name), _patched_registry(registry, name))
            else:
                raise ValueError(f"attn_implementation {name!r} is not registered in transformers")
        return list(patches.values())

    def _close(self) -> None:
        # Masks and modules are needed only while the forward runs; the result may be kept for long.
        self._masks.clear()
        self._modules.clear()

    def _record(
        self,
        implementation: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        kwargs: Any,
    ) -> None:
        # Inside a backward pass this is a checkpoint's recomputation: the entries were read in the forward.
        if torch._C._current_graph_task_id() != -1:
            return
        if not torch.is_grad_enabled() and _inside_reentrant_checkpoint():
            raise ValueError(_REENTRANT)
        if id(module) in self._seen:
            self._repeated = True
            return
        self._check_call(module, query, key)
        rows = self.rows.to(query.device)
        call = AttentionCall(module, mask, kwargs, rows, query.shape[1], query.shape[2])
        visible = self._visible(implementation, call)
        query, key = _compute_dtype(implementation, module, query, key)
        with _outside_checkpoint(), torch.autocast(query.device.type, enabled=False):
            read = self._read(query, key, rows, visible, kwargs.get("scaling"))
            self._sum = read if self._sum is None else self._sum + read.to(self._sum.device)
        self._seen.add(id(module))

    def _check_call(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
        batch, heads, length = query.shape[:3]
        if key.shape[2] != length:
            raise ValueError(
                f"attention can be captured over a whole sequence only, got {length} queries for {key.shape[2]} "
                "keys: run the model without earlier tokens in its key-value cache"
            )
        if batch != self.rows.shape[0]:
            raise ValueError(f"rows must have one entry a sample ({batch}), got {self.rows.shape[0]}")
        if self._highest >= length:
            raise ValueError(
                f"rows and columns must be below the sequence length {length}, got {self._highest}"
            )
        expected = getattr(getattr(module, "config", None), "num_attention_heads", heads)
        if isinstance(expected, int) and expected != heads:
            raise ValueError(
                f"attention must run all {expected} heads on one device to be captured, got {heads}: tensor and "
                "sequence parallelism are not supported"
            )
        if _saves_selected_activations():
            raise ValueError(
                "selective activation checkpointing cannot be combined with captured attention; use "
                "non-re-entrant gradient checkpointing without context_fn"
            )

    def _visible(self, implementation: str, call: AttentionCall) -> VisibleKeys:
        # The layers share one mask, so it is examined once; holding it keeps its id from being used again.
        key = (id(call.mask), call.causal, call.kwargs.get("sliding_window"))
        if key not in self._masks or self._masks[key][0] is not call.mask:
            self._masks[key] = (call.mask, read_mask(implementation, call))
        return self._masks[key][1]

    def _read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        visible: VisibleKeys,
        scale: float | None,
    ) -> torch.Tensor:
        columns, absent = self.columns, None
        if not isinstance(columns, slice):
            columns = columns.to(query.device)
            absent = (columns < 0)[:, None]
            columns = columns.clamp(min=0)
        if visible.explicit is not None:
            explicit = visible.explicit.to(query.device)
            read = masked_attention_rows(query, key, rows, columns, explicit, softmax_scale=scale)
        else:
            read = _attention_rows(query, key, rows, columns, visible, scale)
        return read if absent is None else read.masked_fill(absent, 0.0)


def _attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | slice,
    visible: VisibleKeys,
    scale: float | None,
) -> torch.Tensor:
    import mekernels

    key_mask = None if visible.key_mask is None else visible.key_mask.to(query.device)
    read = mekernels.attention_rows(
        query, key, rows, columns, softmax_scale=scale, causal=visible.causal, key_mask=key_mask
    )
    return read if read.dtype == torch.float64 else read.float()


def _wrapped(implementation: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper of ``original``: always the same object, so that compiled code stays valid."""
    return _wrappers(implementation, original)


@functools.lru_cache(maxsize=64)
def _wrappers(implementation: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @torch._disable_dynamo
    @functools.wraps(original)
    def attention_function(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(module, query, key, value, attention_mask, *args, **kwargs)
        captured = _active
        if captured is not None and id(module) in captured._modules:
            if args:
                raise ValueError(f"{type(module).__name__} must pass the options of its attention by keyword")
            captured._record(implementation, module, query, key, attention_mask, kwargs)
        return result

    return attention_function


@contextlib.contextmanager
def _patched_registry(registry: Any, name: str) -> Iterator[None]:
    local = registry._local_mapping
    present, before = name in local, registry[name]
    wrapper = _wrapped(name, before)
    registry[name] = wrapper
    try:
        yield
    finally:
        # Something registered meanwhile is another's; the wrapper inside it is inert from now on.
        if local.get(name) is wrapper:
            if present:
                registry[name] = before
            else:
                del registry[name]


@contextlib.contextmanager
def _patched_global(namespace: dict[str, Any], key: str, name: str) -> Iterator[None]:
    before = namespace[key]
    wrapper = _wrapped(name, before)
    namespace[key] = wrapper
    try:
        yield
    finally:
        if namespace.get(key) is wrapper:
            namespace[key] = before


@contextlib.contextmanager
def _outside_checkpoint() -> Iterator[None]:
    """Keep what the read saves for backward out of a surrounding checkpoint's list of tensors to recompute."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        yield


def _compute_dtype(
    implementation: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round queries and keys as the attention function does before it multiplies them."""
    kind = query.device.type
    dtype = query.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif implementation.startswith("flash") and dtype == torch.float32:
        dtype = next((m.weight.dtype for m in module.modules() if isinstance(m, nn.Linear)), dtype)
    return query.to(dtype), key.to(dtype)


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True and module.training:
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
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(
        type(mode).__name__ == "_CachingTorchDispatchMode" for mode in _get_current_dispatch_mode_stack()
    )


def _checked_positions(name: str, positions: Any) -> torch.Tensor:
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(positions).__name__}")
    if positions.dtype != torch.int64 or positions.dim() != 2:
        raise ValueError(
            f"{name} must be (batch, count) int64, got {tuple(positions.shape)} {positions.dtype}".replace(
                "torch.", ""
            )
        )
    return positions


def _check_slice(columns: slice) -> None:
    start, stop = columns.start, columns.stop
    if columns.step not in (None, 1):
        raise ValueError(f"columns must be a slice of step 1, got {columns}")
    if not isinstance(stop, int) or stop < 0 or (start is not None and not 0 <= start <= stop):
        raise ValueError(f"columns must be a slice with 0 <= start <= stop, got {columns}")


def _highest_position(rows: torch.Tensor, columns: torch.Tensor | slice) -> int:
    highest = int(rows.max()) if rows.numel() else -1
    if isinstance(columns, slice):
        return max(highest, columns.stop - 1)
    return max(highest, int(columns.max())) if columns.numel() else highest
