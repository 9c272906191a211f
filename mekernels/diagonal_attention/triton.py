"""Same-position attention of all frame pairs, from query, key and logsumexp.

A program takes a few positions of one head. For each position the entries are the product of a (F, D) by a
(D, F) matrix, so a tile of positions is one batched product on the tensor cores, and query and key are read
once where all frames fit one tile (F <= 32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as common
from .. import resources
from ..launch import Launch


@triton.jit
def load_tokens(pointer, token, known, stride_n, stride_d, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) values from width ``first`` on, zero for unknown tokens and beyond the width."""
    width = first + tl.arange(0, BLOCK_D)
    place = token.to(tl.int64)[:, None] * stride_n + width.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + place, mask=known[:, None] & (width < WIDTH)[None, :], other=0.0)


@triton.jit
def diagonal_tile(
    query,
    key,
    query_token,
    query_known,
    lse,
    key_token,
    key_known,
    query_n,
    query_d,
    key_n,
    key_d,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_P, BLOCK_F, BLOCK_F) attention of every position's query frames to its key frames."""
    shift = tl.reshape(lse, (BLOCK_P, BLOCK_F, 1))
    total = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), tl.float32)
    for part in range(FOLD):
        scores = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), tl.float32)
        own = key_token + part * part_tokens
        for first in range(0, WIDTH, BLOCK_D):
            q = load_tokens(query, query_token, query_known, query_n, query_d, first, WIDTH, BLOCK_D)
            k = load_tokens(key, own, key_known, key_n, key_d, first, WIDTH, BLOCK_D)
            k = tl.permute(tl.reshape(k, (BLOCK_P, BLOCK_F, BLOCK_D)), (0, 2, 1))
            q = tl.reshape(q, (BLOCK_P, BLOCK_F, BLOCK_D))
            scores = tl.dot(q, k, scores, input_precision="ieee")
        total += tl.exp(scores * scale - shift)
    return total


@triton.jit
def diagonal_attention_kernel(
    out,
    query,
    key,
    lse,
    out_b,
    out_h,
    out_f,
    out_g,
    out_p,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    lse_b,
    lse_h,
    lse_n,
    heads,
    frames,
    positions,
    start,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write out (B, H, F, F, P)."""
    blocks = tl.cdiv(positions, BLOCK_P)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    lse += sample * lse_b + head * lse_h
    out += sample * out_b + head * out_h

    entry = tl.arange(0, BLOCK_P * BLOCK_F)
    first_position = tl.program_id(0) % blocks * BLOCK_P
    position = first_position + entry // BLOCK_F
    p = (first_position + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
    for first_query in range(0, frames, BLOCK_F):
        frame = first_query + entry % BLOCK_F
        query_known = (frame < frames) & (position < positions)
        query_token = start + frame * positions + position
        shift = tl.load(lse + query_token.to(tl.int64) * lse_n, mask=query_known, other=0.0).to(tl.float32)
        f = (first_query + tl.arange(0, BLOCK_F)).to(tl.int64)[None, :, None]
        for first_key in range(0, frames, BLOCK_F):
            other = first_key + entry % BLOCK_F
            total = diagonal_tile(
                query,
                key,
                query_token,
                query_known,
                shift,
                start + other * positions + position,
                (other < frames) & (position < positions),
                query_n,
                query_d,
                key_n,
                key_d,
                part_tokens,
                scale,
                FOLD,
                WIDTH,
                BLOCK_P,
                BLOCK_F,
                BLOCK_D,
            )
            g = (first_key + tl.arange(0, BLOCK_F)).to(tl.int64)[None, None, :]
            mask = (p < positions) & (f < frames) & (g < frames)
            tl.store(out + f * out_f + g * out_g + p * out_p, total, mask=mask)


def position_blocks(frames: int, width: int, dtype: torch.dtype, queries: int) -> dict[str, int]:
    """Tile sizes for about so many queries a program; fewer positions where there are many frames."""
    block_f = min(16 if dtype == torch.float32 else 32, max(16, common.power_of_two(frames)))
    block_d = common.inner_block(width, dtype)
    return {"BLOCK_P": max(1, queries // block_f), "BLOCK_F": block_f, "BLOCK_D": block_d}


def plan(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    frames: int,
    positions: int,
    start: int,
    softmax_scale: float,
    fold: int,
) -> Launch:
    """The launch that writes out (B, H, F, F, P)."""
    batch, heads, _, width = query.shape
    small = width <= 32
    tile = position_blocks(frames, width, query.dtype, 64 if small or query.dtype == torch.float32 else 128)
    arguments = {
        "out": out,
        "query": query,
        "key": key,
        "lse": lse,
        **common.strides("out", out, "bhfgp"),
        **common.strides("query", query, "bhnd"),
        **common.strides("key", key, "bhnd"),
        **common.strides("lse", lse, "bhn"),
        "heads": heads,
        "frames": frames,
        "positions": positions,
        "start": start,
        "part_tokens": key.shape[2] // fold,
        "scale": float(softmax_scale),
        "FOLD": fold,
        "WIDTH": width,
        **tile,
    }
    grid = (batch * heads * common.cdiv(positions, tile["BLOCK_P"]),)
    return Launch(
        diagonal_attention_kernel, grid, arguments, {"num_warps": 4 if small else 8, "num_stages": 2}
    )


def shapes() -> dict[str, common.Shape]:
    """Production shapes, and the narrowest and widest heads."""
    return common.SHAPES | {f"width {width}": common.Shape(30, width, 13, 1350, 226) for width in (32, 256)}


def gates() -> list[resources.Gate]:
    """All shapes, one and two key parts."""
    found = []
    for name, shape in shapes().items():
        for dtype in common.DTYPES:
            fold = 2 if dtype == torch.bfloat16 else 1
            query, key, lse = common.meta_inputs(shape, dtype, fold)
            size = (1, shape.heads, shape.frames, shape.frames, shape.positions)
            out = torch.empty(size, device="meta")
            layout = (shape.frames, shape.positions, shape.text)
            launch = plan(out, query, key, lse, *layout, shape.width**-0.5, fold)
            label = f"diagonal_attention {name} {str(dtype)[6:]} fold {fold}"
            found.append(resources.Gate(label, launch, dtype != torch.float32))
    return found
