"""How the kernel of ``MotionStatistics.update`` is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import launch, resources
from ..diagonal_attention.call import Call
from ..diagonal_attention.plan import position_blocks, shapes
from ..launch import Launch
from .sums import COLUMNS, MAPS, Sums, padded
from .triton import motion_statistics_kernel


def update(sums: Sums, call: Call, more: Sequence[Call] = ()) -> None:
    """The op: add the map of one sample, and the maps of ``more`` calls of the same layout."""
    launch.run(plan(sums, call, more))


def plan(sums: Sums, call: Call, more: Sequence[Call] = ()) -> Launch:
    """The launch that adds at most MAPS maps to the sums; the first axis of query and key is 1."""
    query, frames, positions = call.query, call.frames, call.positions
    heads, width, exact = query.shape[1], query.shape[3], query.dtype == torch.float32
    # All kinds of programs read and write more than they compute: three small ones on a multiprocessor hide
    # each other's waiting better than a large one.
    tile = position_blocks(frames, width, query.dtype, 64)
    tile |= {"BLOCK_Q": 64 if exact else 128, "BLOCK_T": 16 if exact else 64}
    tile |= {"BLOCK_R": 32 if exact else 64, "BLOCK_N": 64}
    options = {"num_warps": 4, "num_stages": 2}
    if exact or width > 64:
        # One program of eight warps. Without this bound the compiler would spill registers.
        options |= {"num_warps": 8, "maxnreg": 255}
    if width > 128 and not exact:
        tile |= {"BLOCK_Q": 64, "BLOCK_D": 32}
    # One kernel serves any number of further maps: the first map is passed in place of missing ones.
    others = (*more, *[call] * (MAPS - 1 - len(more))) if more else ()
    arguments = {
        "diagonal": sums.diagonal,
        "rows": sums.rows,
        "vision_mass": sums.vision_mass,
        "query": query,
        "key": call.key,
        "lse": call.lse,
        "more_queries": tuple(one.query for one in others),
        "more_keys": tuple(one.key for one in others),
        "more_lse": tuple(one.lse for one in others),
        "index": sums.tokens,
        "rows_strides": sums.rows.stride(),
        "query_strides": query.stride(),
        "key_strides": call.key.stride(),
        **_strides("diagonal", sums.diagonal, "head", "query", "key", "position"),
        **_strides("mass", sums.vision_mass, "head", "token"),
        **_strides("lse", call.lse[0], "head", "token"),
        "maps": 1 + len(more),
        "count": len(sums.tokens),
        "frames": frames,
        "positions": positions,
        "start": call.start,
        "text": call.text,
        "text_start": call.text_start,
        "part_tokens": call.own,
        "scale_log2": call.softmax_scale * math.log2(math.e),
        "FOLD": call.fold,
        "WIDTH": width,
        "PADDED": sums.rows.shape[2] >= padded(call.vision, tile["BLOCK_N"]),
        **tile,
    }
    programs = launch.cdiv(positions, tile["BLOCK_P"])
    programs += launch.cdiv(call.vision, tile["BLOCK_N"]) + launch.cdiv(call.vision, tile["BLOCK_Q"])
    return Launch(motion_statistics_kernel, (heads * programs,), arguments, options)


def _strides(name: str, tensor: torch.Tensor, *axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def gates() -> list[resources.Gate]:
    """All shapes, one and two key parts, 104 rows; one map, and MAPS maps."""
    found = []
    for name, shape in shapes().items():
        for dtype in launch.DTYPES:
            fold = 2 if dtype == torch.bfloat16 else 1
            query, key, lse = launch.meta_inputs(shape, dtype, fold)
            heads, frames, positions = shape.heads, shape.frames, shape.positions
            diagonal = torch.empty(heads, positions, frames, frames, device="meta").permute(0, 2, 3, 1)
            rows = torch.empty(heads, 104, padded(frames * positions, COLUMNS), device="meta")
            mass = torch.empty(heads, frames * positions, device="meta")
            index = torch.empty(104, dtype=torch.int64, device="meta")
            layout = (frames, positions, shape.text, shape.text, 0)
            call = Call(query, key, lse, *layout, shape.width**-0.5, fold)
            for maps in (1, MAPS):
                planned = plan(Sums(diagonal, rows, mass, index), call, [call] * (maps - 1))
                several = f", {maps} maps," if maps > 1 else ""
                label = f"motion_statistics {name}{several} {str(dtype)[6:]} fold {fold}"
                found.append(resources.Gate(label, planned, dtype != torch.float32))
    return found
