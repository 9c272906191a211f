"""How the kernel of ``diagonal_attention`` is launched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import launch, resources
from ..launch import Launch
from .call import Call
from .triton import diagonal_attention_kernel


def forward(call: Call) -> Tensor:
    """The op: (B, H, F, F, P)."""
    query = call.query
    size = (*query.shape[:2], call.frames, call.frames, call.positions)
    out = query.new_empty(size, dtype=torch.float32)
    launch.run(plan(out, call))
    return out


def position_blocks(frames: int, width: int, dtype: torch.dtype, queries: int) -> dict[str, int]:
    """Tile sizes for about ``queries`` queries a program; with more frames, fewer positions."""
    block_f = min(16 if dtype == torch.float32 else 32, max(16, launch.power_of_two(frames)))
    block_d = launch.inner_block(width, dtype)
    return {"BLOCK_P": max(1, queries // block_f), "BLOCK_F": block_f, "BLOCK_D": block_d}


def plan(out: Tensor, call: Call) -> Launch:
    """The launch that writes out (B, H, F, F, P), contiguous."""
    query, frames, positions = call.query, call.frames, call.positions
    batch, heads, _, width = query.shape
    tile = position_blocks(frames, width, query.dtype, 64)
    arguments = {
        "out": out,
        "query": query,
        "key": call.key,
        "lse": call.lse,
        "query_strides": query.stride(),
        "key_strides": call.key.stride(),
        **dict(zip(("lse_batch", "lse_head", "lse_token"), call.lse.stride(), strict=True)),
        "heads": heads,
        "frames": frames,
        "positions": positions,
        "start": call.start,
        "part_tokens": call.own,
        "scale_log2": call.softmax_scale * math.log2(math.e),
        "FOLD": call.fold,
        "WIDTH": width,
        **tile,
    }
    grid = (batch * heads * launch.cdiv(positions, tile["BLOCK_P"]),)
    # Without this bound the compiler spills registers so that more programs run at a time.
    options = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}
    return Launch(diagonal_attention_kernel, grid, arguments, options)


def shapes() -> dict[str, launch.Shape]:
    """Production shapes, and the narrowest and widest heads."""
    return launch.SHAPES | {f"width {width}": launch.Shape(30, width, 13, 1350, 226) for width in (32, 256)}


def gates() -> list[resources.Gate]:
    """All shapes, one and two key parts."""
    found = []
    for name, shape in shapes().items():
        for dtype in launch.DTYPES:
            fold = 2 if dtype == torch.bfloat16 else 1
            query, key, lse = launch.meta_inputs(shape, dtype, fold)
            size = (1, shape.heads, shape.frames, shape.frames, shape.positions)
            out = torch.empty(size, device="meta")
            layout = (shape.frames, shape.positions, shape.text, shape.text, 0)
            planned = plan(out, Call(query, key, lse, *layout, shape.width**-0.5, fold))
            label = f"diagonal_attention {name} {str(dtype)[6:]} fold {fold}"
            found.append(resources.Gate(label, planned, dtype != torch.float32))
    return found
