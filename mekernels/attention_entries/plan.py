"""How the kernels that read entries are launched: tile sizes and grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch, resources
from ..launch import Launch, cdiv, power_of_two
from .call import APART, Call, Diagonals
from .triton import PER_KEY, PER_ROW, column_entries, entry_gradient, entry_sums
from .triton_statistics import row_statistics_kernel


class Tiles(NamedTuple):
    """Tile sizes and compiler options of one kernel."""

    outer: int
    inner: int
    num_warps: int
    num_stages: int


_TILES = {
    "columns": (
        *[Tiles(64, 64, 4, 2)] * 2,
        Tiles(32, 32, 8, 2),
        *[Tiles(32, 32, 4, 1)] * 2,
        Tiles(16, 32, 8, 1),
    ),
    "sums": (
        *[Tiles(64, 64, 4, 3)] * 2,
        Tiles(64, 32, 8, 2),
        *[Tiles(32, 32, 8, 1)] * 2,
        Tiles(16, 32, 8, 1),
    ),
    "gradient": (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 8, 2), *[Tiles(16, 32, 8, 1)] * 3),
}
"""The largest tiles that do not spill, for head widths up to 64, 128, 256, in half precision and float32."""


def _arguments(name: str, call: Call, inner: int, **more: Any) -> tuple[Tiles, dict[str, Any]]:
    """The tiles, and the arguments of all kernels. ``inner`` is the length of the inner axis."""
    width, half = call.query.shape[3], call.query.dtype != torch.float32
    tile = _TILES[name][(0 if width <= 64 else 1 if width <= 128 else 2) + (0 if half else 3)]
    if name == "gradient" and call.query.dtype == torch.float16 and 64 < width <= 128:
        # The scale that float16 needs takes registers.
        tile = Tiles(64, 32, 8, 2)
    tile = tile._replace(inner=min(tile.inner, max(16, power_of_two(inner))))
    block_d = max(16, power_of_two(width))
    bias = None if call.bias is None else call.bias.expand(call.map_shape)
    return tile, {
        "query": call.query,
        "key": call.key,
        "lse": call.lse.contiguous(),
        "places": None if call.places is None else call.places.contiguous(),
        "bias": bias,
        "ranges": None if call.key_range is None else call.key_range.contiguous(),
        "b_strides": (0, 0, 0, 0) if bias is None else bias.stride(),
        "q_strides": call.query.stride(),
        "k_strides": call.key.stride(),
        "rows": call.query.shape[2],
        "keys": call.key.shape[2],
        "start": call.start,
        "shift": call.shift,
        "lower": call.shift - call.left,
        "upper": call.shift + call.right,
        "scale": call.softmax_scale,
        "GROUPS": call.groups,
        "WIDTH": width,
        "LOWER": call.left >= 0,
        "UPPER": call.right >= 0,
        "RANGE": call.key_range is not None,
        "SOFTCAP": call.softcap,
        "BIAS": 0.0 if bias is None else torch.finfo(bias.dtype).min / 2,
        "LISTED": call.places is not None,
        "CHUNK": block_d if half else 16,
        "BLOCK_O": tile.outer,
        "BLOCK_I": tile.inner,
        "BLOCK_D": block_d,
        **more,
    }


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tiles, arguments: dict[str, Any]) -> Launch:
    named = {name: arguments[name] for name in kernel.arg_names}
    # Without this bound the compiler spills registers so that more programs run at a time.
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": 255}
    return Launch(kernel, grid, named, options)


def columns(call: Call, mean: bool) -> Tensor:
    """(B, R, C) mean over the heads, or (B, Hq, R, C)."""
    batch, heads, *size = call.map_shape
    out = call.query.new_zeros((batch, 1 if mean else heads, *size), dtype=torch.float32)
    launch.run(plan_columns(out, call))
    return out[:, 0] if mean else out


def plan_columns(out: Tensor, call: Call) -> Launch:
    """The launch that writes out (B, 1 or Hq, R, C), contiguous."""
    batch, heads, rows, keys = call.map_shape
    tile, arguments = _arguments("columns", call, keys, out=out, heads=heads, MEAN=out.shape[1] == 1)
    grid = (cdiv(rows, tile.outer) * cdiv(keys, tile.inner), out.shape[1], batch)
    return _launch(column_entries, grid, tile, arguments)


def sums(call: Call, over_rows: bool, largest: bool) -> Tensor:
    """(B, Hq, C) over the rows, or (B, Hq, R) over the keys."""
    batch, heads, rows, keys = call.map_shape
    out = call.query.new_empty((batch, heads, keys if over_rows else rows), dtype=torch.float32)
    launch.run(plan_sums(out, call, over_rows, largest))
    return out


def plan_sums(out: Tensor, call: Call, over_rows: bool, largest: bool) -> Launch:
    """The launch that writes out (B, Hq, C or R), contiguous."""
    batch, heads, length = out.shape
    inner = call.map_shape[2 if over_rows else 3]
    tile, arguments = _arguments("sums", call, inner, out=out, KEYS=over_rows, LARGEST=largest)
    return _launch(entry_sums, (cdiv(length, tile.outer), heads, batch), tile, arguments)


def row_statistics(call: Call, diagonals: Diagonals, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, distance and share on the diagonals of every row's attention, each (B, Hq, R)."""
    entropy, distance = (torch.empty_like(call.lse, memory_format=torch.contiguous_format) for _ in range(2))
    along = torch.empty_like(entropy) if diagonals.period else entropy.new_empty(0)
    launch.run(plan_row_statistics(entropy, distance, along, call, diagonals, fold))
    return entropy, distance, along


def plan_row_statistics(
    entropy: Tensor, distance: Tensor, along: Tensor, call: Call, diagonals: Diagonals, fold: int
) -> Launch:
    """The launch that writes entropy, distance and, with a period, ``along``, (B, Hq, R), contiguous."""
    batch, heads, rows, keys = call.map_shape
    results = {"entropy": entropy, "distance": distance, "along": along if diagonals.period else None}
    options = {"DIAGONALS": diagonals.period > 0, "APART": APART, "FOLD": fold}
    shared = results | diagonals._asdict() | options
    tile, arguments = _arguments("sums", call, keys // fold, **shared)
    return _launch(row_statistics_kernel, (cdiv(rows, tile.outer), heads, batch), tile, arguments)


def backward(grad: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and logsumexp, from the (B, Hq, R, C) gradient of the entries."""
    found = [torch.empty_like(item, memory_format=torch.contiguous_format) for item in call[:3]]
    for planned in plan_backward(grad.float(), call, *found):
        launch.run(planned)
    return found[0], found[1], found[2]


def plan_backward(
    grad: Tensor, call: Call, grad_query: Tensor, grad_key: Tensor, grad_lse: Tensor
) -> list[Launch]:
    """The launches that write the gradients, contiguous."""
    given = PER_KEY if grad.stride(2) == 0 else PER_ROW if grad.stride(3) == 0 else 0
    shared = {
        "grad": grad,
        "g_strides": grad.stride(),
        "GIVEN": getattr(given, "value", given),
        "SCALED": call.query.dtype == torch.float16,
        "lse_out": grad_lse,
    }
    launches = []
    for keys, out in ((False, grad_query), (True, grad_key)):
        inner = call.map_shape[2 if keys else 3]
        tile, arguments = _arguments("gradient", call, inner, **shared, out=out, KEYS=keys)
        grid = (cdiv(out.shape[2], tile.outer), out.shape[1], out.shape[0])
        launches.append(_launch(entry_gradient, grid, tile, arguments))
    return launches


LIMITED, PACKED, FOLDED = "Gemma-2-9B", "packed Qwen2.5-VL-7B", "CogVideoX-5B"
"""The shapes with a window, a soft cap and a bias; with key ranges; and with two parts of the keys. The last
two have diagonals, and only the kernels that these change most."""

SHAPES = {
    LIMITED: (16, 8, 256, 8192, torch.bfloat16),
    "Qwen2.5-VL-7B 8k": (28, 4, 128, 8192, torch.float16),
    "width 64": (16, 16, 64, 8192, torch.bfloat16),
    "width 256": (8, 4, 256, 8192, torch.float16),
    "Qwen2.5-VL-7B float32": (28, 4, 128, 8192, torch.float32),
    PACKED: (28, 4, 128, 8192, torch.float16),
    FOLDED: (48, 48, 64, 17776, torch.bfloat16),
}
"""Query heads, key heads, width, keys and dtype at which the kernels are judged."""


def gates() -> list[resources.Gate]:
    """The kernels at the attention of real models: 64 columns, listed in the first and the last shape."""
    found = []

    def add(name: str, planned: Launch) -> None:
        shaped = planned.arguments["query"].dtype != torch.float32
        found.append(resources.Gate(f"attention_entries {name}", planned, shaped))

    for name, (heads, kv_heads, width, keys, dtype) in SHAPES.items():
        listed = name.endswith(("8k", "float32"))
        fold, limited = 2 if name == FOLDED else 1, name == LIMITED
        query = torch.empty(1, heads, keys, width, dtype=dtype, device="meta")
        key = torch.empty(1, kv_heads, fold * keys, width, dtype=dtype, device="meta")
        lse = torch.empty(1, heads, keys, device="meta")
        bias = torch.empty(1, heads, 1, keys, dtype=dtype, device="meta") if limited else None
        limits = (width**-0.5, 4096 if limited else -1, 0 if fold == 1 else -1, 50.0 if limited else 0.0)
        ranges = torch.empty(1, keys, 2, dtype=torch.int32, device="meta") if name == PACKED else None
        of_parts = torch.empty(1, 2 * keys, dtype=torch.int64, device="meta") if name == FOLDED else None
        whole = Call(query, key, lse, of_parts, bias, ranges, 0, 0, *limits)
        frames = Diagonals(226, keys, 1350, 0) if name in (PACKED, FOLDED) else Diagonals(0, 0, 0, 0)
        add(f"row_statistics {name}", plan_row_statistics(lse, lse, lse, whole, frames, fold))
        if name == FOLDED:
            continue
        places = torch.empty(1, 64, dtype=torch.int64, device="meta") if listed else None
        of_few = None if bias is None else bias[..., :64]
        few = whole._replace(key=key[:, :, :64].contiguous(), places=places, bias=of_few)
        mean = torch.empty(1, 1, keys, 64, device="meta")
        add(f"column_entries {name}", plan_columns(mean, few))
        results = [torch.empty_like(item) for item in (query, key, lse)]
        for over, part, given in (
            ("rows", whole, lse[:, :, None].expand(whole.map_shape)),
            ("keys", whole, lse[..., None].expand(whole.map_shape)),
            ("columns", few, mean.expand(few.map_shape)),
        )[: 1 if name == PACKED else 3]:
            if part is whole:
                add(f"entry_sums over {over} {name}", plan_sums(lse, whole, over == "rows", False))
            for planned, of in zip(plan_backward(given, part, *results), ("query", "key"), strict=True):
                add(f"entry_gradient of {of}, {over} {name}", planned)
    return found
