"""The keys that a row may see, read from the arguments of the attention implementation. Exact, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device. From the CPU this does not wait: the source is kept until it is copied."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function for ``rows`` (B, R) of ``length`` queries, as the model made it.

    The queries are those of the last tokens of ``keys``.
    """

    module: nn.Module
    mask: Any
    kwargs: Mapping[str, Any]
    rows: torch.Tensor
    heads: int
    length: int
    keys: int

    @property
    def causal(self) -> bool:
        """The causal flag in effect in the implementation."""
        flag = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if flag is None else flag)


@dataclass(frozen=True)
class VisibleKeys:
    """The keys of each row: a causal flag, a (B, N) key mask and (B, R, 2) key ranges, or an explicit mask.

    ``key_range`` holds the first key of each row and one past the last, after packing and windows. The key
    mask removes padding between them. ``explicit`` (B, 1 or Hq, R, N) is boolean, or a float mask that is
    added to the scores (blocked entries are -inf or the lowest number of the dtype). If it is given, the
    other fields are unused.
    """

    causal: bool = True
    key_mask: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    explicit: torch.Tensor | None = None

    def options(self, device: torch.device) -> dict[str, Any]:
        """The keys as arguments of :func:`mekernels.attention_rows` or ``layer_attention_rows``."""
        if self.explicit is not None:
            return {"mask": self.explicit.to(device)}
        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        key_range = None if self.key_range is None else self.key_range.to(device)
        return {"causal": self.causal, "key_mask": key_mask, "key_range": key_range}


@dataclass(frozen=True, eq=False)
class Parts:
    """Stands for a mask: the sequence is packed, and each part attends to itself.

    ``starts`` holds the first position of each part and the end of the last part, like ``cu_seqlens``.
    """

    starts: torch.Tensor


MaskReader = Callable[[AttentionCall], VisibleKeys]
MASK_READERS: dict[str, MaskReader] = {}

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Options by which flash attention knows a packed sequence; it uses them only together."""

_UNSUPPORTED = {
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "keys chosen by an indexer",
    "block_indices": "keys chosen by an indexer",
    "block_table": "a paged cache",
    "cache": "a paged cache",
    "k_cache": "a paged cache",
    "v_cache": "a paged cache",
}


def register_mask_reader(name: str) -> Callable[[MaskReader], MaskReader]:
    """Register how the masks of the attention implementation ``name`` are read.

    The function gets an :class:`AttentionCall` and returns :class:`VisibleKeys`. It raises ValueError for a
    mask that it cannot express exactly.

    >>> @register_mask_reader("my_causal_kernel")
    ... def _reader(call):
    ...     return VisibleKeys(causal=True)
    >>> _ = MASK_READERS.pop("my_causal_kernel")
    """

    def register(reader: MaskReader) -> MaskReader:
        MASK_READERS[name] = reader
        return reader

    return register


def implementation_name(name: str, function: Callable[..., Any]) -> str:
    """Return the implementation whose mask reader fits ``function``, which is registered as ``name``.

    With the package ``kernels``, transformers replaces ``flash_attention_2`` by the name of a repository. The
    name may include a revision and a function. transformers' own function for flash attention is registered
    under this name. Earlier versions also put the prefix of a paged cache before any name.

    Args:
        name: as in ``config._attn_implementation``.
        function: the function registered under the name.

    Returns:
        A name of ``MASK_READERS``, or ``name`` if the function is unknown.
    """
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward

    if name in MASK_READERS:
        return name
    plain = name.removeprefix("paged|")
    kernels = {*flash.FLASH_ATTN_KERNEL_FALLBACK.values(), *getattr(flash, "FLASH_ATTN_KERNEL_VERSIONS", ())}
    if function is flash_attention_forward or re.split("[@:]", plain)[0].strip() in kernels:
        return "flash_attention_2"
    return plain if plain in MASK_READERS else name


def read_mask(implementation: str, call: AttentionCall) -> VisibleKeys:
    """Return the keys that each row of ``call`` may see under ``implementation``.

    Raises:
        ValueError: the implementation is unknown, or the call uses an option whose effect on the attention
            weights cannot be computed from queries and keys.
    """
    if implementation not in MASK_READERS:
        raise ValueError(
            f"attn_implementation must be one of {sorted(MASK_READERS)} to capture attention, got "
            f"{implementation!r}; others can be added with register_mask_reader"
        )
    for name, what in _UNSUPPORTED.items():
        if call.kwargs.get(name) is not None:
            raise ValueError(
                f"attention with {what} ({name}) cannot be captured, in {type(call.module).__name__}"
            )
    if isinstance(call.mask, Parts):
        if call.causal:
            raise ValueError(f"{type(call.module).__name__} attends causally in parts: not supported")
        packed = dict.fromkeys(_PACKED, call.mask.starts)
        return _flash(replace(call, mask=None, kwargs={**packed, "is_causal": False}))
    return MASK_READERS[implementation](call)


def _dense(call: AttentionCall) -> VisibleKeys:
    """Gather the rows of a (1 or B, 1 or Hq, N, N) mask. A causal flag and a key mask may replace it."""
    mask, rows = call.mask, call.rows
    if mask.dim() != 4 or mask.shape[2] != call.length or mask.shape[3] < call.keys:
        raise ValueError(
            f"attention_mask must be (batch, heads, {call.length}, {call.keys}), got {tuple(mask.shape)}"
        )
    if mask.shape[0] not in (1, rows.shape[0]) or mask.shape[1] not in (1, call.heads):
        raise ValueError(
            f"attention_mask must have 1 or {rows.shape[0]} samples and 1 or {call.heads} heads, got "
            f"{tuple(mask.shape)}"
        )
    mask = mask[..., : call.keys].expand(rows.shape[0], -1, -1, -1)
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, mask.shape[1], -1, call.keys)
    explicit = mask.gather(2, index)
    if mask.shape[1] != 1:
        return VisibleKeys(explicit=explicit)
    return _simplify(explicit, rows)


def _simplify(explicit: torch.Tensor, rows: torch.Tensor) -> VisibleKeys:
    """Use key ranges and a key mask if they are equivalent to ``explicit`` (B, 1, R, N)."""
    biased = torch.zeros((), dtype=torch.bool, device=explicit.device)
    allowed = explicit
    if explicit.dtype != torch.bool:
        allowed = explicit > torch.finfo(explicit.dtype).min / 2
        biased = (allowed & (explicit != 0)).any()
    allowed = allowed[:, 0] & (rows >= 0)[..., None]
    position = torch.arange(allowed.shape[-1], device=allowed.device)
    first = torch.where(allowed, position, allowed.shape[-1]).amin(dim=-1)
    end = torch.where(allowed, position + 1, 0).amax(dim=-1).maximum(first)
    between = (position >= first[..., None]) & (position < end[..., None])
    # A key that lies between a row's first and last but that no row sees is padding.
    keys = allowed.any(dim=1) | ~between.any(dim=1)
    other = (allowed != (between & keys[:, None])).any()
    flags = torch.stack([biased, other, keys.all()]).tolist()
    if flags[0] or flags[1]:
        return VisibleKeys(explicit=explicit)
    key_range = torch.stack([first, end], dim=-1)
    return VisibleKeys(causal=False, key_mask=None if flags[2] else keys, key_range=key_range)


@register_mask_reader("sdpa")
def _sdpa(call: AttentionCall) -> VisibleKeys:
    for dropped in ("softcap", "s_aux"):
        if call.kwargs.get(dropped) is not None:
            raise ValueError(f"sdpa does not know the {dropped} of {type(call.module).__name__}; use eager")
    if call.mask is not None:
        return _dense(call)
    if call.causal and 1 < call.length < call.keys:
        # The keys of a static cache that is empty still: the first of them are those of the queries.
        return VisibleKeys(causal=False, key_range=torch.stack([call.rows * 0, call.rows + 1], -1))
    return VisibleKeys(causal=call.causal and call.length > 1)


@register_mask_reader("eager")
def _eager(call: AttentionCall) -> VisibleKeys:
    # Eager attention has no causal flag: without a mask every row sees every key.
    if call.mask is None:
        return VisibleKeys(causal=False)
    return _dense(call)


@register_mask_reader("flash_attention_2")
@register_mask_reader("flash_attention_3")
@register_mask_reader("flash_attention_4")
def _flash(call: AttentionCall) -> VisibleKeys:
    rows, length, mask = call.rows, call.keys, call.mask
    window = call.kwargs.get("sliding_window")
    window = None if window is None or length <= window else int(window)
    if mask is not None and (mask.dim() != 2 or mask.shape != (rows.shape[0], length)):
        raise ValueError(
            f"attention_mask must be ({rows.shape[0]}, {length}), got {tuple(mask.shape)}: flash attention "
            "with a static cache is not read"
        )
    key_mask = None if mask is None else mask.bool()
    documents = None if mask is not None else _documents(call)
    if window is None and documents is None:
        return VisibleKeys(causal=call.causal, key_mask=key_mask)
    # Padding is taken out before the kernel runs, so a window counts real tokens only.
    real = torch.ones(rows.shape[0], length, dtype=torch.int64, device=rows.device)
    real = real if key_mask is None else key_mask.to(real)
    place = real.cumsum(dim=1) - 1
    at = rows.clamp(min=0) + (length - call.length)
    own = place.gather(1, at)
    first, last = torch.zeros_like(own), torch.full_like(own, length - 1)
    if window is not None:
        first, last = own - window + 1, own + window - 1
    if call.causal:
        last = own
    if documents is not None:
        same = documents.gather(1, at)
        first = first.maximum(torch.searchsorted(documents, same))
        last = last.minimum(torch.searchsorted(documents, same, right=True) - 1)
    key_range = torch.stack(
        [torch.searchsorted(place, first.contiguous()), torch.searchsorted(place, last, right=True)], dim=-1
    )
    return VisibleKeys(causal=False, key_mask=key_mask, key_range=key_range)


def _documents(call: AttentionCall) -> torch.Tensor | None:
    """Number the packed sequences of a batch without padding: (B, N) int64; None if nothing is packed."""
    kwargs, batch = call.kwargs, call.rows.shape[0]
    if all(kwargs.get(name) is not None for name in _PACKED):
        starts, ends = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        # Mostly both are one tensor; a comparison of two would wait for their device.
        if starts is not ends and (starts.shape != ends.shape or not torch.equal(starts, ends)):
            raise ValueError("cu_seq_lens_q must equal cu_seq_lens_k to capture self-attention")
        flat = torch.arange(batch * call.length, device=call.rows.device)
        numbers = torch.searchsorted(starts.to(flat), flat, right=True)
        return numbers.view(batch, call.length)
    position_ids = kwargs.get("position_ids")
    if position_ids is None or batch != 1 or call.length == 1 or call.length != call.keys:
        return None
    if position_ids.dim() != 2 or position_ids.shape[-1] != call.length:
        raise ValueError(f"position_ids must be (1, {call.length}), got {tuple(position_ids.shape)}")
    return (position_ids == position_ids.min()).long().cumsum(dim=-1).to(call.rows.device)


@register_mask_reader("flex_attention")
def _flex(call: AttentionCall) -> VisibleKeys:
    mask, rows = call.mask, call.rows
    if mask is None:
        return VisibleKeys(causal=False)
    if isinstance(mask, torch.Tensor):
        return _dense(call)
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is None:
        raise ValueError(f"attention_mask must be a tensor or a BlockMask, got {type(mask).__name__}")
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    position = torch.arange(call.keys, device=rows.device)
    head = torch.zeros((), dtype=torch.int64, device=rows.device)
    samples = torch.arange(rows.shape[0], device=rows.device)

    def visible(sample: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return torch.vmap(mask_mod, in_dims=(None, None, None, 0))(sample, head, row, position)

    per_row = torch.vmap(torch.vmap(visible, in_dims=(None, 0)), in_dims=(0, 0))
    with TransformGetItemToIndex():
        allowed = per_row(samples, rows.clamp(min=0))
    return _simplify(allowed[:, None], rows)
