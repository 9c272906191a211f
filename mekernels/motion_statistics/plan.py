"""How the kernel of ``MotionStatistics.update`` is launched."""

from __future__ import annotations

import torch

from .. import launch, resources
from ..diagonal_attention.call import Call
from ..diagonal_attention.plan import position_blocks, shapes
from ..launch import Launch
from .sums import Sums
from .triton import motion_statistics_kernel


def update(sums: Sums, call: Call) -> None:
    """The op: add the map of one sample."""
    launch.run(plan(sums, call))


def plan(sums: Sums, call: Call) -> Launch:
    """The launch that adds the map of one sample to the sums; the first axis of query and key is 1."""
    query, frames, positions = call.query, call.frames, call.positions
    heads, width, exact = query.shape[1], query.shape[3], query.dtype == torch.float32
    # Both kinds of programs read and write more than they compute: three small ones on a multiprocessor hide
    # each other's waiting better than a large one.
    tile = position_blocks(frames, width, query.dtype, 64)
    tile |= {"BLOCK_T": 16 if exact else 64, "BLOCK_R": 32 if exact else 64, "BLOCK_N": 64}
    arguments = {
        "diagonal": sums.diagonal,
        "rows": sums.rows,
        "vision_mass": sums.vision_mass,
        "query": query,
        "key": call.key,
        "lse": call.lse,
        "index": sums.tokens,
        "diagonal_strides": sums.diagonal.stride(),
        "rows_strides": sums.rows.stride(),
        "vision_mass_strides": sums.vision_mass.stride(),
        "query_strides": query.stride(),
        "key_strides": call.key.stride(),
        "lse_strides": call.lse.stride(),
        "count": len(sums.tokens),
        "frames": frames,
        "positions": positions,
        "start": call.start,
        "text": call.text,
        "text_start": call.text_start,
        "part_tokens": call.own,
        "scale": call.softmax_scale,
        "FOLD": call.fold,
        "WIDTH": width,
        **tile,
    }
    programs = launch.cdiv(positions, tile["BLOCK_P"]) + launch.cdiv(call.vision, tile["BLOCK_N"])
    options = {"num_warps": 8 if exact or width > 128 else 4, "num_stages": 2}
    return Launch(motion_statistics_kernel, (heads * programs,), arguments, options)


def gates() -> list[resources.Gate]:
    """All shapes, one and two key parts, 64 chosen rows."""
    found = []
    for name, shape in shapes().items():
        for dtype in launch.DTYPES:
            fold = 2 if dtype == torch.bfloat16 else 1
            query, key, lse = launch.meta_inputs(shape, dtype, fold)
            heads, frames, positions = shape.heads, shape.frames, shape.positions
            diagonal = torch.empty(heads, positions, frames, frames, device="meta").permute(0, 2, 3, 1)
            rows = torch.empty(heads, 64, frames * positions, device="meta")
            mass = torch.empty(heads, frames * positions, device="meta")
            index = torch.empty(64, dtype=torch.int64, device="meta")
            layout = (frames, positions, shape.text, shape.text, 0)
            call = Call(query, key, lse, *layout, shape.width**-0.5, fold)
            planned = plan(Sums(diagonal, rows, mass, index), call)
            label = f"motion_statistics {name} {str(dtype)[6:]} fold {fold}"
            found.append(resources.Gate(label, planned, dtype != torch.float32))
    return found
