"""How the kernels of ``attention_rows`` are called: tile sizes, cuts along the keys, and buffers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import resources
from ..launch import Launch, cdiv, power_of_two, run
from . import triton as forward_kernels
from . import triton_backward as backward_kernels
from .call import Call

MAX_CUTS = 32
"""Partial results of one row that a kernel combines."""


class Tiles(NamedTuple):
    """Tile sizes and compiler options of one kernel."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(kernel: str, call: Call) -> Tiles:
    """Tiles that fit the registers and the shared memory of compute capability 8.0 and later."""
    width = call.query.shape[3]
    rows = call.rows.shape[1] if kernel == "columns" else call.stacked
    rows = max(16, power_of_two(rows))
    if call.query.dtype == torch.float32:
        most = 16 if width > 128 or kernel == "query_gradient" else 32
        return Tiles(min(rows, most), 16 if width > 128 and kernel == "slope" else 32, 8, 1)
    if kernel == "lse" and rows >= 128 and width <= 128:
        return Tiles(128, 64, 8, 3)
    most, keys, num_warps = _HALF[kernel][0 if width <= 64 else 1 if width <= 128 else 2]
    return Tiles(min(rows, most), keys, num_warps, 2)


_HALF = {
    "lse": ((64, 64, 4), (64, 64, 4), (64, 64, 8)),
    "columns": ((64, 64, 4), (64, 64, 8), (32, 32, 8)),
    "slope": ((64, 64, 4), (64, 64, 8), (64, 64, 8)),
    "key_gradient": ((32, 64, 4), (32, 64, 8), (32, 64, 8)),
    "query_gradient": ((64, 64, 4), (64, 32, 8), (32, 64, 8)),
}
"""Rows, keys and warps at head widths up to 64, 128 and 256: the largest that spill no register."""


def cuts(call: Call, programs: int, length: int, step: int) -> tuple[int, int]:
    """Into how many cuts of how many places to divide ``length``, so that every multiprocessor has work."""
    device = call.query.device
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = 132 if device.type == "meta" else 2
    wanted = max(1, min(cdiv(2 * processors, max(1, programs)), cdiv(length, step), MAX_CUTS))
    span = cdiv(cdiv(length, step), wanted) * step
    return cdiv(length, span), span


def _common(call: Call) -> dict[str, Any]:
    query, key, rows = call.query, call.key, call.rows.contiguous()
    width = query.shape[3]
    return {
        "query": query,
        "key": key,
        "rows": rows,
        "ranges": None if call.key_range is None else call.key_range.contiguous(),
        "key_mask": None if call.key_mask is None else call.key_mask.contiguous(),
        "q_strides": query.stride(),
        "k_strides": key.stride(),
        "count": rows.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "own": call.own,
        "scale": call.softmax_scale,
        "GROUPS": call.groups,
        "WIDTH": width,
        "CAUSAL": call.causal,
        "RANGE": call.key_range is not None,
        "MASK": call.key_mask is not None,
        "FOLD": call.fold,
        "BLOCK_D": max(16, power_of_two(width)),
        "CHUNK": 16 if query.dtype == torch.float32 else max(16, power_of_two(width)),
    }


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tiles, arguments: dict[str, Any]) -> Launch:
    arguments |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    named = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, grid, named, {"num_warps": tile.num_warps, "num_stages": tile.num_stages})


def plan_forward(call: Call) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """The launches of the forward, its result, the rows' logsumexp and the rest of it."""
    query, key, count, width = call.query, call.key, call.rows.shape[1], call.width
    (batch, heads), kv_heads, keys = query.shape[:2], key.shape[1], key.shape[2]
    out = query.new_empty(call.out_shape, dtype=torch.float32)
    lse, rest = (query.new_empty((batch, heads, count), dtype=torch.float32) for _ in range(2))
    if not keys or not width or not out.numel():
        return [], out.zero_(), lse.fill_(-torch.inf), rest.zero_()
    shared = _common(call)
    tile = tiles("lse", call)
    blocks = cdiv(call.stacked, tile.rows)
    splits, span = cuts(call, blocks * kv_heads * batch, keys, tile.keys)
    tops, totals = query.new_empty((2, splits, batch, kv_heads, call.stacked), dtype=torch.float32)
    shared |= {"tops": tops, "totals": totals, "splits": splits, "span": span, "SPLITS": power_of_two(splits)}
    launches = [_launch(forward_kernels.row_lse, (blocks * splits, kv_heads, batch), tile, dict(shared))]
    shared |= {
        "columns": None if call.columns is None else call.columns.contiguous(),
        "lse_out": lse,
        "rest_out": rest,
        "out": out,
        "kv_heads": kv_heads,
        "width": width,
        "start": call.start,
        "MEAN": call.mean,
        "INDEX": call.columns is not None,
    }
    tile = tiles("columns", call)
    grid = (cdiv(width, tile.keys), cdiv(count, tile.rows), batch * (1 if call.mean else heads))
    launches.append(_launch(forward_kernels.row_columns, grid, tile, dict(shared)))
    return launches, out, lse, rest


def dense_gradient(call: Call, grad: Tensor) -> Tensor:
    """(B, own, R) or (B, Hq, own, R): the gradients of equal columns added, in their order."""
    assert call.columns is not None
    own, count = call.own, call.rows.shape[1]
    seen = (call.columns >= 0) & (call.columns < own)
    # Columns without a key add zero, each at another place: all at one place would be a queue.
    spare = torch.arange(call.width, device=grad.device) % own
    place = torch.where(seen, call.columns, spare)
    shape = (*grad.shape[:-2], own, count)
    dense = grad.new_zeros(shape)
    given = grad.mT.masked_fill(~(seen if call.mean else seen[:, None])[..., None], 0)
    place = place if call.mean else place[:, None].expand(-1, grad.shape[1], -1)
    lists = torch.arange(place.shape[:-1].numel(), device=grad.device).view(*place.shape[:-1], 1)
    # index_put_ with accumulation sorts on CUDA, so its order of addition is fixed; index_add_ does not.
    flat = dense.view(-1, count)
    flat.index_put_(((place + lists * own).reshape(-1),), given.reshape(-1, count), accumulate=True)
    return dense


def _gradient_strides(call: Call, grad: Tensor, row: int, column: int) -> tuple[int, int, int, int]:
    """(batch, head, row, column); a mean over the heads is the same for all of them."""
    return grad.stride(0), 0 if call.mean else grad.stride(1), row, column


def plan_backward(grad: Tensor, lse: Tensor, rest: Tensor, call: Call) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of the backward and the gradients of query and key."""
    query, key, count, width = call.query, call.key, call.rows.shape[1], call.width
    (batch, heads), kv_heads, keys = query.shape[:2], key.shape[1], key.shape[2]
    grad_query, grad_key = torch.zeros_like(query), torch.empty_like(key)
    if not keys or not width or not count or not batch:
        return [], grad_query, grad_key.zero_()
    grad = grad.float().contiguous()
    shared = _common(call)
    shared |= {
        "lse_in": lse.contiguous(),
        "rest_in": rest.contiguous(),
        "grad": grad,
        "g_strides": _gradient_strides(call, grad, grad.stride(-2), grad.stride(-1)),
        "columns": None if call.columns is None else call.columns.contiguous(),
        "width": width,
        "start": call.start,
        "grad_scale": 1.0 / heads if call.mean else 1.0,
        "INDEX": call.columns is not None,
        "SCALED": query.dtype == torch.float16,
        # The widest layout is that of dense_gradient.
        "WIDE": grad[0].numel() // max(1, width) * keys >= 2**31,
    }
    tile = tiles("slope", call)
    blocks = cdiv(call.stacked, tile.rows)
    splits, span = cuts(call, blocks * kv_heads * batch, width, tile.keys)
    slope = query.new_empty((splits, batch, kv_heads, call.stacked), dtype=torch.float32)
    own_part: dict[str, Any] = {"partial": slope, "splits": splits, "span": span}
    grid = (blocks * splits, kv_heads, batch)
    launches = [_launch(backward_kernels.row_slope, grid, tile, shared | own_part)]

    shared |= {"slope_in": slope, "slope_splits": splits, "SPLITS": power_of_two(splits)}
    if call.columns is None:
        shared |= {"stop": call.stop}
    else:
        dense = dense_gradient(call, grad)
        shared |= {"grad": dense, "start": 0, "stop": dense.shape[-2]}
        shared |= {"g_strides": _gradient_strides(call, dense, 1, dense.stride(-2))}
    tile = tiles("key_gradient", call)
    own_part = {"out": grad_key, "splits": splits, "o_strides": grad_key.stride()}
    grid = (cdiv(keys, tile.keys), kv_heads, batch)
    launches.append(_launch(backward_kernels.key_gradient, grid, tile, shared | own_part))

    tile = tiles("query_gradient", call)
    blocks = cdiv(call.stacked, tile.rows)
    splits, span = cuts(call, blocks * kv_heads * batch, keys, tile.keys)
    size = (splits, batch, kv_heads, call.stacked, query.shape[3])
    partial = query.new_empty(size, dtype=torch.float32)
    own_part = {"partial": partial, "splits": splits, "span": span}
    grid = (blocks * splits, kv_heads, batch)
    launches.append(_launch(backward_kernels.query_gradient, grid, tile, shared | own_part))

    ordered, order = call.rows.sort(dim=1, stable=True)
    own_part |= {"out": grad_query, "ordered": ordered, "order": order, "o_strides": grad_query.stride()}
    one = Tiles(1, 1, 1, 1)
    grid = (count, heads, batch)
    launches.append(_launch(backward_kernels.scatter_rows, grid, one, shared | own_part))
    return launches, grad_query, grad_key


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of the op: attention, the rows' logsumexp and its rest."""
    launches, *results = plan_forward(call)
    for launch in launches:
        run(launch)
    return results[0], results[1], results[2]


def backward(grad: Tensor, lse: Tensor, rest: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The backward of the op: the gradients of query and key."""
    launches, grad_query, grad_key = plan_backward(grad, lse, rest, call)
    for launch in launches:
        run(launch)
    return grad_query, grad_key


SHAPES = {
    "Qwen2.5-VL-7B 8k": (28, 4, 128, 8192, torch.float16),
    "Qwen2.5-VL-7B 32k": (28, 4, 128, 32768, torch.bfloat16),
    "width 64": (16, 16, 64, 8192, torch.bfloat16),
    "width 256": (8, 4, 256, 8192, torch.float16),
    "Qwen2.5-VL-7B float32": (28, 4, 128, 8192, torch.float32),
}
"""Query heads, key heads, width, keys and dtype the kernels are judged at, with 64 rows."""


def gates() -> list[resources.Gate]:
    """The kernels at the attention of real models, chosen columns by slice and by index."""
    found = []
    for name, (heads, kv_heads, width, keys, dtype) in SHAPES.items():
        index = name.endswith("8k")
        call = Call(
            query=torch.empty(1, heads, keys, width, dtype=dtype, device="meta"),
            key=torch.empty(1, kv_heads, keys, width, dtype=dtype, device="meta"),
            rows=torch.empty(1, 64, dtype=torch.int64, device="meta"),
            columns=torch.empty(1, 4096, dtype=torch.int64, device="meta") if index else None,
            start=0 if index else 15,
            stop=0 if index else 4111,
            softmax_scale=width**-0.5,
            causal=True,
            key_mask=torch.empty(1, keys, dtype=torch.bool, device="meta"),
            fold=1,
            mean=True,
            key_range=torch.empty(1, 64, 2, dtype=torch.int64, device="meta") if index else None,
        )
        launches, out, lse, rest = plan_forward(call)
        for launch in [*launches, *plan_backward(out, lse, rest, call)[0]]:
            kernel = launch.kernel.__name__
            shaped = dtype != torch.float32 and kernel != "scatter_rows"
            found.append(resources.Gate(f"attention_rows {kernel} {name}", launch, shaped))
    return found
