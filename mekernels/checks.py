"""Argument checks. Every message names the argument, its value and the requirement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .layout import VideoTokens


def tensor(name: str, value: object, ndim: int, *, layout: str = "") -> None:
    """Require a dense floating-point tensor of ``ndim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.ndim != ndim:
        hint = f" {layout}" if layout else ""
        raise ValueError(f"{name} must have {ndim} dimensions{hint}, got shape {tuple(value.shape)}")


def index_tensor(name: str, value: object, ndim: int, *, layout: str = "") -> None:
    """Require an int64 tensor of ``ndim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int64 torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}")
    if value.ndim != ndim:
        hint = f" {layout}" if layout else ""
        raise ValueError(f"{name} must have {ndim} dimensions{hint}, got shape {tuple(value.shape)}")


def shape(name: str, value: Tensor, expected: Sequence[int], *, meaning: str = "") -> None:
    """Require an exact shape."""
    if tuple(value.shape) != tuple(expected):
        hint = f" {meaning}" if meaning else ""
        raise ValueError(f"{name} must have shape {tuple(expected)}{hint}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors of one dtype."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {value.dtype}")


def boolean(name: str, value: object) -> None:
    """Require a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def video_tokens(name: str, value: object) -> None:
    """Require a :class:`VideoTokens`."""
    if not isinstance(value, VideoTokens):
        raise TypeError(f"{name} must be a mekernels.VideoTokens, got {type(value).__name__}")


def grid(name: str, value: object) -> tuple[int, int, int]:
    """Require (frames, height, width), each at least 1."""
    if not isinstance(value, Sequence) or len(value) != 3:
        raise TypeError(f"{name} must be three integers (frames, height, width), got {value!r}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | torch.SymInt):
            raise TypeError(f"{name} must be three integers (frames, height, width), got {value!r}")
        if item < 1:
            raise ValueError(f"{name} must be at least 1 in every dimension, got {tuple(value)}")
    frames, height, width = value
    return frames, height, width


def ratio(name: str, value: object) -> float:
    """Require a share between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return float(value)


def fold(value: object, keys: int) -> int:
    """Require a number of key parts that divides the number of keys; return the keys of one part."""
    number("fold", value, 1)
    assert isinstance(value, int)
    if keys % value:
        raise ValueError(f"fold must divide the number of keys ({keys}), got {value}")
    return keys // value


def scale(softmax_scale: object, width: int) -> float:
    """The softmax scale; 1 / sqrt(width) for None."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(width)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise TypeError(f"softmax_scale must be a float or None, got {type(softmax_scale).__name__}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def softcap(value: object) -> float:
    """The soft cap of the scores; 0 for None."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"softcap must be a float or None, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"softcap must be finite and above 0, got {value}; None for no cap")
    return float(value)


def sinks(value: object, query: Tensor) -> None:
    """Require (Hq,) logits, or None."""
    if value is None:
        return
    tensor("sinks", value, 1, layout="(heads,)")
    assert isinstance(value, Tensor)
    shape("sinks", value, query.shape[1:2], meaning="(heads,)")
    same_device("sinks", value, "query", query)


def bias(
    value: object, query: Tensor, scores: tuple[int, int], *, meaning: str, differentiable: bool = False
) -> None:
    """Require a 4-dimensional bias that broadcasts to (B, Hq, *scores), or None.

    It must not need a gradient unless the op is differentiable in it.
    """
    if value is None:
        return
    tensor("bias", value, 4, layout=meaning)
    assert isinstance(value, Tensor)
    wanted = (*query.shape[:2], *scores)
    if any(size not in (1, most) for size, most in zip(value.shape, wanted, strict=True)):
        raise ValueError(f"bias must have shape {wanted} {meaning}, got {tuple(value.shape)}")
    same_device("bias", value, "query", query)
    if not differentiable and value.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias has no gradient here, but requires one: give bias.detach()")


def cu_seqlens(value: object, query: Tensor, own: int) -> None:
    """Require 0 and the ascending ends of packed sequences."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 torch.Tensor, got {kind}")
    if value.ndim != 1 or not len(value):
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(value.shape)}")
    same_device("cu_seqlens", value, "query", query)
    if query.shape[0] != 1 or query.shape[2] != own:
        raise ValueError(
            "cu_seqlens needs a batch of 1 and as many queries as own keys, got a batch of "
            f"{query.shape[0]}, {query.shape[2]} queries and {own} own keys; see key_range"
        )
    if not _readable(value):
        return
    if value[0] != 0 or value[-1] != own or bool((value[1:] < value[:-1]).any()):
        raise ValueError(
            f"cu_seqlens must ascend from 0 to {own}, the number of tokens, got {value.tolist()}"
        )


def window_size(value: object) -> None:
    """Require (left, right), each from -1 to 2**31 - 1, or None. Larger numbers may overflow."""
    if value is None:
        return
    numbers = value if isinstance(value, tuple) and len(value) == 2 else (None,)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in numbers):
        raise TypeError(f"window must be two integers (left, right) or None, got {value!r}")
    if min(numbers) < -1 or max(numbers) >= 2**31:
        raise ValueError(f"window must hold -1 (no limit) or numbers of keys below 2**31, got {value}")


def query_key(query: object, key: object) -> None:
    """Require matching (batch, heads, tokens, width) queries and keys; grouped-query heads are allowed."""
    tensor("query", query, 4, layout="(batch, heads, tokens, width)")
    tensor("key", key, 4, layout="(batch, heads, tokens, width)")
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    same_dtype("key", key, "query", query)
    same_device("key", key, "query", query)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch size of query ({query.shape[0]}), got {key.shape[0]}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the width of query ({query.shape[3]}), got {key.shape[3]}")
    if query.shape[3] == 0:
        raise ValueError("query must have a width of at least 1, got 0")
    if query.shape[1] == 0:
        raise ValueError("query must have at least 1 head, got 0")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key must have a number of heads that divides the heads of query ({query.shape[1]}), "
            f"got {key.shape[1]}"
        )


def columns(value: object, query: Tensor, own: int, name: str = "columns") -> tuple[Tensor | None, int, int]:
    """Require chosen key positions, a (B, C) int64 tensor or a slice of ``own`` keys.

    Returns:
        The tensor, or None with the first position and one past the last.
    """
    if isinstance(value, slice):
        start, stop, step = value.indices(own)
        stop = max(start, stop) if step > 0 else min(start, stop)
        if step == 1:
            return None, start, stop
        index = torch.arange(start, stop, step, device=query.device)
        return index.expand(query.shape[0], -1), 0, 0
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a slice or an int64 torch.Tensor, got {type(value).__name__}")
    index_tensor(name, value, 2, layout="(batch, columns)")
    same_device(name, value, "query", query)
    shape(name, value, (query.shape[0], value.shape[1]), meaning="(the batch of query, any number)")
    return value, 0, 0


def window(name: str, value: object, length: int) -> slice:
    """Require a slice of step 1, or None for all; return it with both ends set."""
    if value is None:
        return slice(0, length)
    if not isinstance(value, slice):
        raise TypeError(f"{name} must be a slice or None, got {type(value).__name__}")
    start, stop, step = value.indices(length)
    if step != 1:
        raise ValueError(f"{name} must be a slice of step 1, got a step of {step}")
    return slice(start, max(start, stop))


def key_mask(value: object, key: Tensor) -> None:
    """Require a (B, Nk) bool tensor, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"key_mask must be a bool torch.Tensor, got {kind}")
    shape("key_mask", value, (key.shape[0], key.shape[2]), meaning="(batch, keys)")
    same_device("key_mask", value, "query", key)


def key_range(value: object, query: Tensor, rows: int) -> None:
    """Require (B, rows, 2) int64 first keys and ends, or None."""
    if value is None:
        return
    meaning = "(batch, rows, first and end)"
    index_tensor("key_range", value, 3, layout=meaning)
    assert isinstance(value, Tensor)
    shape("key_range", value, (query.shape[0], rows, 2), meaning=meaning)
    same_device("key_range", value, "query", query)


def number(name: str, value: object, least: int) -> None:
    """Require an int that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def logsumexp(value: object, query: Tensor) -> None:
    """Require the (B, Hq, Nq) logsumexp of the rows, in the dtype in which it is computed."""
    tensor("lse", value, 3, layout="(batch, heads, tokens)")
    assert isinstance(value, Tensor)
    shape("lse", value, query.shape[:3], meaning="(batch, heads, tokens)")
    same_device("lse", value, "query", query)
    wanted = accumulate_dtype(query.dtype)
    if value.dtype != wanted:
        raise TypeError(f"lse must have dtype {wanted}: half precision rounds it too far; got {value.dtype}")


def index_values(name: str, value: Tensor, limit: int) -> None:
    """Require -1 <= value < limit, where values can be read."""
    if not _readable(value) or not value.numel():
        return
    low, high = (int(item) for item in torch.aminmax(value))
    if low < -1 or high >= limit:
        wrong = low if low < -1 else high
        raise ValueError(f"{name} must lie between -1 (padding) and {limit - 1}, got {wrong}")


def _readable(value: Tensor) -> bool:
    """Whether values can be read: other devices than the CPU would stall, and torch.compile has none."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def no_functorch(op: str) -> None:
    """Refuse torch.func transforms, which the gradients of these ops do not support."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"mekernels.{op} does not support torch.func transforms; use torch.autograd")


def no_tangents(op: str, values: Iterable[Any]) -> None:
    """Refuse forward-mode derivatives. Without recorded gradients they would be dropped silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for value in values:
        for tensor in value if isinstance(value, list) else (value,):
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"mekernels.{op} does not support forward-mode derivatives; use torch.autograd"
                )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
