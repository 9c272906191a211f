"""How the kernels of ``attention_rows`` are launched: tile sizes, cuts along the keys, and buffers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import resources
from ..launch import Buffers, Launch, Place, Plan, Target, cdiv, interpreted, power_of_two, target
from . import triton as forward_kernels
from . import triton_backward as backward_kernels
from . import triton_bias as bias_kernels
from .call import Call
from .sorted_columns import ordered_columns

MAX_CUTS = 32
"""Maximum number of partial results of one row that a kernel combines."""


class Kind(NamedTuple):
    """Everything that the plan of a call depends on. Calls of the same kind share their launches."""

    device: torch.device
    target: Target
    dtype: torch.dtype
    query: tuple[int, ...]
    """Shape."""
    key: tuple[int, ...]
    query_strides: tuple[int, ...]
    key_strides: tuple[int, ...]
    aligned: tuple[bool, bool]
    """Whether 16 divides the addresses of query and key."""
    rows: int
    """Chosen rows."""
    width: int
    """Chosen columns."""
    start: int
    stop: int
    listed: bool
    masked: bool
    ranged: bool
    sunk: bool
    bias: tuple[torch.dtype, tuple[int, ...]] | None
    """Dtype and strides; stride 0 along an axis on which all values are the same."""
    softmax_scale: float
    causal: bool
    fold: int
    mean: bool
    softcap: float
    graded: tuple[int, ...] = ()
    """Shape of the bias if its gradient is computed; else empty."""

    @classmethod
    def of(cls, call: Call, of_bias: bool = False) -> Kind:
        """The kind of a call; ``of_bias``: whether the gradient of the bias is computed."""
        query, key = call.query, call.key
        kind = cls(
            query.device,
            target(query.device),
            query.dtype,
            tuple(query.shape),
            tuple(key.shape),
            query.stride(),
            key.stride(),
            (query.data_ptr() % 16 == 0, key.data_ptr() % 16 == 0),
            call.rows.shape[1],
            call.width,
            call.start,
            call.stop,
            call.columns is not None,
            call.key_mask is not None,
            call.key_range is not None,
            call.sinks is not None,
            None if call.bias is None else (call.bias.dtype, _bias(call.bias, call).stride()),
            *call.settings[2:],
        )
        return kind if call.bias is None or not of_bias else kind._replace(graded=tuple(call.bias.shape))

    @property
    def memory(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Shape and strides of query and of key."""
        return (self.query, self.query_strides), (self.key, self.key_strides)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query[1] // self.key[1]

    @property
    def stacked(self) -> int:
        """Rows of all query heads that share a key head."""
        return self.rows * self.groups

    @property
    def lists(self) -> tuple[int, ...]:
        """(B,), or (B, Hq) without the mean: each entry has its own rows and columns."""
        return self.query[:1] if self.mean else self.query[:2]

    @property
    def half(self) -> bool:
        """Whether the matrix products run in half precision."""
        return self.dtype != torch.float32

    @property
    def block_d(self) -> int:
        """Width of a tile that holds whole vectors."""
        return max(16, power_of_two(self.query[3]))


class Tiles(NamedTuple):
    """Tile sizes and compiler options of one kernel."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(kernel: str, kind: Kind) -> Tiles:
    """Tiles that fit the registers, also with a bias or float16's scale, and the shared memory."""
    rows = max(16, power_of_two(kind.rows if kernel in ("row_columns", "bias_gradient") else kind.stacked))
    biased = kind.half and kind.bias is not None
    tile = _TILES[kernel][_class(kind)]
    if kernel == "query_gradient" and 64 < kind.query[3] <= 128 and (kind.dtype == torch.float16 or biased):
        tile = Tiles(32, 64, 4, 2)
    if kernel == "row_lse" and kind.half and rows >= 128 and kind.query[3] <= (64 if biased else 128):
        tile = Tiles(128, 64, 8, 3)
    elif biased and (kernel, _class(kind)) in _BIASED:
        tile = tile._replace(keys=tile.keys // 2)
    return tile._replace(rows=min(rows, tile.rows))


def _class(kind: Kind) -> int:
    """Index of the table entry for this call."""
    return (0 if kind.query[3] <= 64 else 1 if kind.query[3] <= 128 else 2) + (0 if kind.half else 3)


_SMALL, _TALL = Tiles(32, 64, 4, 2), Tiles(64, 64, 4, 2)
_TILES = {
    "row_lse": (_TALL, _TALL, Tiles(64, 64, 8, 2), *[Tiles(32, 32, 8, 1)] * 2, Tiles(16, 32, 8, 1)),
    "row_columns": (
        *(_TALL, _TALL, Tiles(32, 32, 8, 2)),
        *(*[Tiles(32, 16, 4, 1)] * 2, Tiles(16, 32, 8, 1)),
    ),
    "row_slope": (
        *(_TALL, Tiles(64, 32, 8, 2), Tiles(64, 64, 8, 2)),
        *(*[Tiles(32, 16, 8, 1)] * 2, Tiles(16, 16, 8, 1)),
    ),
    "key_gradient": (_SMALL, _SMALL, Tiles(32, 64, 8, 2), *[Tiles(16, 32, 8, 1)] * 3),
    "query_gradient": (
        *(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3), Tiles(32, 64, 8, 2)),
        *[Tiles(16, 32, 8, 1)] * 3,
    ),
    "bias_gradient": (*[_SMALL] * 3, *[Tiles(16, 32, 8, 1)] * 3),
}
"""The largest tiles that do not spill, for head widths up to 64, 128, 256, in half precision and float32."""
_BIASED = {("row_lse", 0), ("row_lse", 1), ("row_columns", 1), ("query_gradient", 1), ("row_slope", 2)}
"""Kernels and classes that spill with a tile of biases of that size: they read half as many keys."""


def slots(kernel: str, kind: Kind) -> int:
    """Programs of a kernel that the device runs at a time, limited by registers and shared memory."""
    # The tile of 128 rows is that of the second class, for any width.
    place = 1 if tiles(kernel, kind).rows > 64 else _class(kind)
    held = _RESIDENT[kernel][place] if kind.bias is None else (1, 1)
    return held[0 if kind.target.capability >= 90 else 1] * kind.target.processors


_RESIDENT = {
    "row_lse": ((4, 3), (2, 1), (2, 2), (3, 4), (3, 4), (1, 1)),
    "row_slope": ((3, 2), (2, 1), (1, 1), (4, 5), (4, 5), (1, 1)),
    "query_gradient": ((3, 2), (2, 2), (1, 1), (2, 2), (2, 2), (1, 1)),
}
"""For the classes of :data:`_TILES`, on capability 9.0 and 8.0: the minimum over the builds of `gates`."""


def cuts(held: int, programs: int, length: int, step: int, beside: int = 2) -> tuple[int, int]:
    """Return the number of cuts of ``length``, and the number of positions of one cut.

    The choice takes the least time, counted in steps: with too few cuts some multiprocessors have no work,
    and one cut too many starts another wave.

    Args:
        held: number of programs that the device runs at a time.
        programs: number of programs of the kernel without cuts.
        length: number of positions along the axis to cut.
        step: number of positions that a program reads at a time.
        beside: cost in steps of the start and end of a program, and of combining its result.
    """
    steps = cdiv(length, step)

    def cost(cut: int) -> int:
        span = cdiv(steps, cut)
        return cdiv(max(1, programs) * cdiv(steps, span), held) * (span + beside)

    span = cdiv(steps, min(range(1, min(steps, MAX_CUTS) + 1), key=cost)) * step
    return cdiv(length, span), span


def _places(*names: str, **others: str) -> dict[str, Place]:
    """Placeholders for the tensors of the call, under their own name or another."""
    return {name: Place(name) for name in names} | {name: Place(other) for name, other in others.items()}


def _common(kind: Kind) -> dict[str, Any]:
    width = kind.query[3]
    optional = {"ranges": kind.ranged, "key_mask": kind.masked, "columns": kind.listed}
    optional |= {"bias": kind.bias is not None, "sinks": kind.sunk}
    return {
        **_places("query", "key", "rows"),
        **{name: Place(name) if given else None for name, given in optional.items()},
        "b_strides": kind.bias[1] if kind.bias else (0, 0, 0, 0),
        "q_strides": kind.query_strides,
        "k_strides": kind.key_strides,
        "count": kind.rows,
        "queries": kind.query[2],
        "keys": kind.key[2],
        "own": kind.key[2] // kind.fold,
        "width": kind.width,
        "start": kind.start,
        "scale": kind.softmax_scale,
        "GROUPS": kind.groups,
        "WIDTH": width,
        "CAUSAL": kind.causal,
        "RANGE": kind.ranged,
        "MASK": kind.masked,
        "FOLD": kind.fold,
        "MEAN": kind.mean,
        "SOFTCAP": kind.softcap,
        "BIAS": torch.finfo(kind.bias[0]).min / 2 if kind.bias else 0.0,
        "SINKS": kind.sunk,
        "INDEX": kind.listed,
        "BLOCK_D": kind.block_d,
        "CHUNK": kind.block_d if kind.half else 16,
    }


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tiles, arguments: dict[str, Any]) -> Launch:
    arguments = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys} | arguments
    named = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, grid, named, {"num_warps": tile.num_warps, "num_stages": tile.num_stages})


def _cut_rows(kernel: str, kind: Kind, length: int) -> tuple[Tiles, int, int, tuple[int, ...]]:
    """Tile, number of cuts, length of a cut, and grid of a kernel that cuts ``length``."""
    tile = tiles(kernel, kind)
    blocks, (batch, kv_heads) = cdiv(kind.stacked, tile.rows), kind.key[:2]
    # Partial gradients are whole vectors in memory and are read again in order.
    beside = 9 if kernel == "query_gradient" else 2
    splits, span = cuts(slots(kernel, kind), blocks * kv_heads * batch, length, tile.keys, beside)
    return tile, splits, span, (blocks * splits, kv_heads, batch)


@functools.lru_cache(maxsize=64)
def _forward_plan(kind: Kind) -> Plan:
    (batch, heads), kv_heads, keys, count = kind.query[:2], kind.key[1], kind.key[2], kind.rows
    shared = _common(kind)
    of_rows, single = (batch, heads, count), torch.float32
    tile, splits, span, grid = _cut_rows("row_lse", kind, keys)
    scratch: Buffers = {"sums": ((2, splits, *of_rows), single), "scales": ((2, *of_rows), single)}
    buffers: Buffers = dict.fromkeys(("lse", "rest"), (of_rows, single))
    buffers["out"] = (*kind.lists, count, kind.width), single
    shared |= {"splits": splits, "span": span} | _places("sums", "scales")
    launches = [_launch(forward_kernels.row_lse, grid, tile, shared)]

    small = Tiles(64, 1, 2, 1)
    shared |= _places(lse_out="lse", rest_out="rest")
    grid = (cdiv(kind.stacked, small.rows), kv_heads, batch)
    launches.append(_launch(forward_kernels.combine_rows, grid, small, shared))

    summed = kind.mean and kv_heads > 1
    if summed:
        scratch["partial"] = (kv_heads, *buffers["out"][0]), single
    tile = tiles("row_columns", kind)
    shared |= _places(partial="partial" if summed else "out")
    blocks = cdiv(kind.width, tile.keys) * cdiv(count, tile.rows)
    shared["SCALE"] = 1.0 if summed else 1.0 / heads if kind.mean else 1.0
    grid = (blocks, kv_heads if kind.mean else heads, batch)
    launches.append(_launch(forward_kernels.row_columns, grid, tile, shared))
    if summed:
        size = batch * count * kind.width
        shared |= _places("out") | {"size": size, "kv_heads": kv_heads, "BLOCK": 1024}
        grid = (cdiv(size, shared["BLOCK"]),)
        launches.append(_launch(forward_kernels.mean_heads, grid, Tiles(1, 1, 4, 1), shared))
    return Plan(launches, buffers, scratch)


@functools.lru_cache(maxsize=64)
def _backward_plan(kind: Kind) -> Plan:
    (batch, heads), (_, kv_heads, keys, _), count = kind.query[:2], kind.key, kind.rows
    own, block_d = keys // kind.fold, kind.block_d
    shared = _common(kind)
    # With listed columns, their gradients are first spread over all positions of a part.
    length = own if kind.listed else kind.width
    lists = torch.Size(kind.lists).numel()
    shared |= {
        **_places("grad", lse_in="lse", rest_in="rest"),
        "grad_scale": 1.0 / heads if kind.mean else 1.0,
        "SCALED": kind.dtype == torch.float16,
        "WIDE": lists * count * max(length, kind.width) >= 2**31,
    }
    tile, splits, span, grid = _cut_rows("row_slope", kind, kind.width)
    padded = cdiv(kind.stacked, backward_kernels.PADDED.value) * backward_kernels.PADDED.value
    stacked = (batch, kv_heads, padded)
    scratch: Buffers = {
        "slope": ((splits, batch, kv_heads, kind.stacked), torch.float32),
        "packed": ((*stacked, block_d), kind.dtype),
        "measures": ((3, *stacked), torch.float32),
        "bounds": ((2, *stacked), torch.int32),
        "places": (stacked, torch.int64 if shared["WIDE"] else torch.int32),
    }
    buffers: Buffers = {"slope": scratch.pop("slope")} if kind.sunk else {}
    part: dict[str, Any] = _places(partial="slope") | {"splits": splits, "span": span}
    launches = [_launch(backward_kernels.row_slope, grid, tile, shared | part)]

    if kind.listed:
        scratch["dense"] = (*kind.lists, count, own), torch.float32
        part = _places("ordered", "begins", out="dense") | {"LISTS": lists // batch}
        tile = Tiles(1, 256, 4, 1)
        grid = (cdiv(own, tile.keys), lists * count)
        launches.append(_launch(backward_kernels.spread_columns, grid, tile, shared | part))
        shared |= _places(grad="dense") | {"start": 0, "width": own}

    shared |= _places("packed", "measures", "bounds", "places", slope_in="slope") | {"splits": splits}
    tile = Tiles(16, 1, 4, 1)
    grid = (padded // tile.rows, kv_heads, batch)
    launches.append(_launch(backward_kernels.gather_rows, grid, tile, shared))

    shared["stop"] = shared["start"] + length
    query, key = (torch.empty_strided(shape, strides, device="meta") for shape, strides in kind.memory)
    tile = tiles("key_gradient", kind)
    part = _places(out="grad_key") | {"o_strides": torch.empty_like(key).stride()}
    grid = (cdiv(keys, tile.keys), kv_heads, batch)
    launches.append(_launch(backward_kernels.key_gradient, grid, tile, shared | part))

    tile, splits, span, grid = _cut_rows("query_gradient", kind, keys)
    scratch["partial"] = (splits, batch, kv_heads, kind.stacked, kind.query[3]), torch.float32
    shared |= _places("partial") | {"splits": splits, "span": span}
    launches.append(_launch(backward_kernels.query_gradient, grid, tile, shared))

    part = _places(out="grad_query") | {"o_strides": torch.empty_like(query).stride(), "BLOCK_R": 128}
    grid = (count, heads, batch)
    launches.append(_launch(backward_kernels.scatter_rows, grid, Tiles(1, 1, 1, 1), shared | part))

    if kind.graded:
        of_sample, of_head, of_row = (size > 1 for size in kind.graded[:3])
        buffers["grad_bias"] = (*kind.graded[:3], keys), torch.float32
        tile = tiles("bias_gradient", kind)
        part = _places(out="grad_bias") | {"samples": batch, "kv_heads": kv_heads}
        part |= {"OF_SAMPLE": of_sample, "OF_HEAD": of_head, "OF_ROW": of_row}
        part["CHUNK"] = min(block_d, 32 if kind.half else 16)
        blocks = cdiv(keys, tile.keys) * (cdiv(count, tile.rows) if of_row else 1)
        grid = (blocks, *kind.graded[1::-1])
        launches.append(_launch(bias_kernels.bias_gradient, grid, tile, shared | part))
    return Plan(launches, buffers, scratch)


def _plan(make: Any, kind: Kind) -> Plan:
    return make(kind) if _KEEP else make.__wrapped__(kind)


_KEEP = not interpreted()
"""Whether to keep plans. The interpreter gains nothing from kept plans."""


def _bias(bias: Tensor, call: Call) -> Tensor:
    return bias.expand(*call.query.shape[:2], call.rows.shape[1], call.key.shape[2])


def _given(call: Call, **tensors: Tensor) -> dict[str, Tensor]:
    """The tensors of a call, by their names in the kernels."""
    tensors |= {"query": call.query, "key": call.key, "rows": call.rows.contiguous()}
    if call.bias is not None:
        tensors["bias"] = _bias(call.bias, call)
    optional = {"columns": call.columns, "key_mask": call.key_mask, "ranges": call.key_range}
    for name, value in (optional | {"sinks": call.sinks}).items():
        if value is not None:
            tensors[name] = value.contiguous()
    return tensors


def _begin_forward(call: Call) -> tuple[Plan | None, dict[str, Tensor]]:
    """The plan of the forward, and its tensors."""
    if not call.key.shape[2] or not call.width or not call.query.shape[0] or not call.rows.shape[1]:
        shape = (*call.query.shape[:2], call.rows.shape[1])
        out = call.query.new_zeros(call.out_shape, dtype=torch.float32)
        lse = out.new_full(shape, -torch.inf)
        return None, {"out": out, "lse": lse, "rest": torch.zeros_like(lse)}
    plan = _plan(_forward_plan, Kind.of(call))
    return plan, plan.tensors(call.query.device, _given(call))


def _begin_backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool
) -> tuple[Plan | None, dict[str, Tensor]]:
    """The plan of the backward, and its tensors."""
    results = {"grad_query": torch.zeros_like(call.query)}
    if not call.key.shape[2] or not call.width or not call.query.shape[0] or not call.rows.shape[1]:
        return None, results | {"grad_key": torch.zeros_like(call.key)}
    results["grad_key"] = torch.empty_like(call.key)
    sums = {"lse": lse.contiguous(), "rest": rest.contiguous()}
    given = _given(call, grad=grad.float().contiguous(), **sums, **results)
    if call.columns is not None:
        given["ordered"], given["begins"] = ordered_columns(call.columns, call.own)
    plan = _plan(_backward_plan, Kind.of(call, of_bias))
    return plan, plan.tensors(call.query.device, given)


def plan_forward(call: Call) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """The launches of the forward, its result, the logsumexp of the rows and the rounding rest."""
    plan, tensors = _begin_forward(call)
    launches = plan.bound(call.query.device, tensors) if plan else []
    return launches, tensors["out"], tensors["lse"], tensors["rest"]


def plan_backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool = False
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of the backward and the gradients of query and key. Gradients of sinks need no launch."""
    plan, tensors = _begin_backward(grad, lse, rest, call, of_bias)
    return plan.bound(call.query.device, tensors) if plan else [], tensors["grad_query"], tensors["grad_key"]


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of the op: attention, logsumexp of the rows and its rounding rest."""
    plan, tensors = _begin_forward(call)
    if plan:
        plan.run(call.query.device, tensors)
    return tensors["out"], tensors["lse"], tensors["rest"]


def backward(
    grad: Tensor, lse: Tensor, rest: Tensor, call: Call, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward of the op: the gradients of query, key and sinks, and of the bias if asked."""
    plan, tensors = _begin_backward(grad, lse, rest, call, of_bias)
    if plan:
        plan.run(call.query.device, tensors)
    sinks = lse.new_zeros(0) if call.sinks is None else torch.zeros_like(call.sinks)
    if plan and call.sinks is not None:
        slope = tensors["slope"].sum(0).unflatten(2, (call.rows.shape[1], -1)).transpose(2, 3)
        given = call.sinks.float()[:, None]
        share = torch.where(given == -torch.inf, 0, (given - lse - rest).exp())
        sinks = -(slope.reshape(lse.shape) * share).sum((0, 2)).to(sinks.dtype)
    bias = lse.new_zeros(0 if call.bias is None or not of_bias else call.bias.shape)
    if "grad_bias" in tensors:
        bias = tensors["grad_bias"].sum_to_size(bias.shape)
    if call.bias is not None:
        bias = bias.to(call.bias.dtype)
    return tensors["grad_query"], tensors["grad_key"], sinks, bias


SOFTCAP, SINKS, GROUPED = "Gemma-2-9B", "gpt-oss-20b", "Llama-3.2-1B 8k"
"""The shape with a soft cap, the shape with sinks and a bias of every head and key, and the shape where many
rows share a narrow head: of it, only the kernel with tiles of its own."""

SHAPES = {
    SOFTCAP: (16, 8, 256, 8192, torch.bfloat16),
    SINKS: (64, 8, 64, 8192, torch.bfloat16),
    "Qwen2.5-VL-7B 8k": (28, 4, 128, 8192, torch.float16),
    "Qwen2.5-VL-7B 32k": (28, 4, 128, 32768, torch.bfloat16),
    "width 64": (16, 16, 64, 8192, torch.bfloat16),
    "width 256": (8, 4, 256, 8192, torch.float16),
    "Qwen2.5-VL-7B float32": (28, 4, 128, 8192, torch.float32),
    GROUPED: (32, 8, 64, 8192, torch.bfloat16),
}
"""Query heads, key heads, width, keys and dtype at which the kernels are judged, with 64 rows."""


def gates() -> list[resources.Gate]:
    """The kernels at the attention of real models, chosen columns by slice and by index."""
    found = []
    for name, (heads, kv_heads, width, keys, dtype) in SHAPES.items():
        query, key = (torch.empty(1, n, keys, width, dtype=dtype, device="meta") for n in (heads, kv_heads))
        rows, columns = (torch.empty(1, n, dtype=torch.int64, device="meta") for n in (64, 4096))
        mask, ranges = torch.empty(1, keys, dtype=torch.bool, device="meta"), rows[..., None].repeat(1, 1, 2)
        cap = 50.0 if name == SOFTCAP else 0.0
        call = Call(query, key, rows, None, mask, None, 15, 4111, width**-0.5, True, 1, True, cap)
        if name.endswith("8k"):
            call = call._replace(columns=columns, key_range=ranges, start=0, stop=0)
        if name == SINKS:
            bias = torch.empty(1, heads, 1, keys, dtype=dtype, device="meta")
            call = call._replace(sinks=bias[0, :, 0, 0].clone(), bias=bias)
        launches, out, lse, rest = plan_forward(call)
        launches += plan_backward(out, lse, rest, call, call.bias is not None)[0]
        for launch in launches[: 1 if name == GROUPED else None]:
            kernel, half = launch.kernel.__name__, dtype != torch.float32
            found.append(resources.Gate(f"attention_rows {kernel} {name}", launch, half and kernel in _TILES))
    return found
