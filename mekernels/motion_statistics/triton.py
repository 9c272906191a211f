"""One launch that adds an attention map's diagonals, whole rows and mass on video to the running sums.

The programs of a head stand together, so that its keys are still in the cache for the second kind:

- position programs take a few positions of all frames: the batched product of their queries with their keys
  gives the diagonals, the product of the same queries with the text keys the mass that is not on video;
- key programs take a block of video keys and multiply it with all chosen rows.

Every element of the sums belongs to one program, so nothing depends on the order they run in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as common
from .. import resources
from ..diagonal_attention.triton import diagonal_tile, load_tokens, position_blocks, shapes
from ..launch import Launch


@triton.jit
def text_mass(
    query,
    key,
    token,
    known,
    shift,
    query_n,
    query_d,
    key_n,
    key_d,
    text,
    text_start,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_Q,) mass of queries on all text keys."""
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    blocks = tl.cdiv(text, BLOCK_T)
    for step in range(blocks * FOLD):
        word = step % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        other = text_start + step // blocks * part_tokens + word
        scores = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
        for first in range(0, WIDTH, BLOCK_D):
            q = load_tokens(query, token, known, query_n, query_d, first, WIDTH, BLOCK_D)
            k = load_tokens(key, other, word < text, key_n, key_d, first, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        weights = tl.exp(scores * scale - shift[:, None])
        mass += tl.sum(tl.where((word < text)[None, :], weights, 0.0), 1)
    return mass


@triton.jit
def add_positions(
    diagonal,
    vision_mass,
    query,
    key,
    lse,
    diagonal_f,
    diagonal_g,
    diagonal_p,
    vision_mass_n,
    query_n,
    query_d,
    key_n,
    key_d,
    lse_n,
    block,
    frames,
    positions,
    start,
    text,
    text_start,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Diagonals (F, F, P) and mass on video (S,) of one head for a few positions."""
    entry = tl.arange(0, BLOCK_P * BLOCK_F)
    position = block * BLOCK_P + entry // BLOCK_F
    p = (block * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
    for first_query in range(0, frames, BLOCK_F):
        frame = first_query + entry % BLOCK_F
        known = (frame < frames) & (position < positions)
        own = frame * positions + position
        token = start + own
        shift = tl.load(lse + token.to(tl.int64) * lse_n, mask=known, other=0.0).to(tl.float32)
        f = (first_query + tl.arange(0, BLOCK_F)).to(tl.int64)[None, :, None]
        for first_key in range(0, frames, BLOCK_F):
            other = first_key + entry % BLOCK_F
            total = diagonal_tile(
                query,
                key,
                token,
                known,
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
            place = diagonal + f * diagonal_f + g * diagonal_g + p * diagonal_p
            mask = (p < positions) & (f < frames) & (g < frames)
            tl.store(place, tl.load(place, mask=mask) + total, mask=mask)
        mass = text_mass(
            query,
            key,
            token,
            known,
            shift,
            query_n,
            query_d,
            key_n,
            key_d,
            text,
            text_start,
            part_tokens,
            scale,
            FOLD,
            WIDTH,
            BLOCK_P * BLOCK_F,
            BLOCK_T,
            BLOCK_D,
        )
        left = tl.maximum(1.0 - mass, 0.0, propagate_nan=tl.PropagateNan.ALL)
        place = vision_mass + own.to(tl.int64) * vision_mass_n
        tl.store(place, tl.load(place, mask=known) + left, mask=known)


@triton.jit
def add_rows(
    rows,
    query,
    key,
    lse,
    index,
    rows_r,
    rows_n,
    query_n,
    query_d,
    key_n,
    key_d,
    lse_n,
    block,
    count,
    vision,
    start,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Chosen rows (R, S) of one head for a block of video keys."""
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = column < vision
    for first_row in range(0, count, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        known = row < count
        token = tl.load(index + row, mask=known, other=0)
        shift = tl.load(lse + token * lse_n, mask=known, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for part in range(FOLD):
            scores = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            other = start + part * part_tokens + column
            for first in range(0, WIDTH, BLOCK_D):
                q = load_tokens(query, token, known, query_n, query_d, first, WIDTH, BLOCK_D)
                k = load_tokens(key, other, seen, key_n, key_d, first, WIDTH, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
            total += tl.exp(scores * scale - shift[:, None])
        place = rows + row.to(tl.int64)[:, None] * rows_r + column.to(tl.int64)[None, :] * rows_n
        mask = known[:, None] & seen[None, :]
        tl.store(place, tl.load(place, mask=mask) + total, mask=mask)


@triton.jit
def motion_statistics_kernel(
    diagonal,
    rows,
    vision_mass,
    query,
    key,
    lse,
    index,
    diagonal_h,
    diagonal_f,
    diagonal_g,
    diagonal_p,
    rows_h,
    rows_r,
    rows_n,
    vision_mass_h,
    vision_mass_n,
    query_h,
    query_n,
    query_d,
    key_h,
    key_n,
    key_d,
    lse_h,
    lse_n,
    count,
    frames,
    positions,
    start,
    text,
    text_start,
    part_tokens,
    scale,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add one map to diagonal (H, F, F, P), rows (H, R, S) and vision_mass (H, S)."""
    position_programs = tl.cdiv(positions, BLOCK_P)
    programs = position_programs + tl.cdiv(frames * positions, BLOCK_N)
    head = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    query += head * query_h
    key += head * key_h
    lse += head * lse_h
    if block < position_programs:
        add_positions(
            diagonal + head * diagonal_h,
            vision_mass + head * vision_mass_h,
            query,
            key,
            lse,
            diagonal_f,
            diagonal_g,
            diagonal_p,
            vision_mass_n,
            query_n,
            query_d,
            key_n,
            key_d,
            lse_n,
            block,
            frames,
            positions,
            start,
            text,
            text_start,
            part_tokens,
            scale,
            FOLD,
            WIDTH,
            BLOCK_P,
            BLOCK_F,
            BLOCK_D,
            BLOCK_T,
        )
    else:
        add_rows(
            rows + head * rows_h,
            query,
            key,
            lse,
            index,
            rows_r,
            rows_n,
            query_n,
            query_d,
            key_n,
            key_d,
            lse_n,
            block - position_programs,
            count,
            frames * positions,
            start,
            part_tokens,
            scale,
            FOLD,
            WIDTH,
            BLOCK_R,
            BLOCK_N,
            BLOCK_D,
        )


def plan(
    diagonal: Tensor,
    rows: Tensor,
    vision_mass: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    frames: int,
    positions: int,
    start: int,
    text: int,
    text_start: int,
    softmax_scale: float,
    fold: int,
) -> Launch:
    """The launch that adds the map of one sample to the sums; the first axis of query and key is 1."""
    heads, width, exact = query.shape[1], query.shape[3], query.dtype == torch.float32
    # Both kinds of programs read and write more than they compute: three small ones on a multiprocessor hide
    # each other's waiting better than a large one.
    tile = position_blocks(frames, width, query.dtype, 64)
    tile |= {"BLOCK_T": 16 if exact else 64, "BLOCK_R": 32 if exact else 64, "BLOCK_N": 64}
    arguments = {
        "diagonal": diagonal,
        "rows": rows,
        "vision_mass": vision_mass,
        "query": query,
        "key": key,
        "lse": lse,
        "index": index,
        **common.strides("diagonal", diagonal, "hfgp"),
        **common.strides("rows", rows, "hrn"),
        **common.strides("vision_mass", vision_mass, "hn"),
        **common.strides("query", query, " hnd"),
        **common.strides("key", key, " hnd"),
        **common.strides("lse", lse, " hn"),
        "count": len(index),
        "frames": frames,
        "positions": positions,
        "start": start,
        "text": text,
        "text_start": text_start,
        "part_tokens": key.shape[2] // fold,
        "scale": float(softmax_scale),
        "FOLD": fold,
        "WIDTH": width,
        **tile,
    }
    programs = common.cdiv(positions, tile["BLOCK_P"]) + common.cdiv(frames * positions, tile["BLOCK_N"])
    options = {"num_warps": 8 if exact or width > 128 else 4, "num_stages": 2}
    return Launch(motion_statistics_kernel, (heads * programs,), arguments, options)


def gates() -> list[resources.Gate]:
    """All shapes, one and two key parts, 64 chosen rows."""
    found = []
    for name, shape in shapes().items():
        for dtype in common.DTYPES:
            fold = 2 if dtype == torch.bfloat16 else 1
            query, key, lse = common.meta_inputs(shape, dtype, fold)
            heads, frames, positions = shape.heads, shape.frames, shape.positions
            diagonal = torch.empty(heads, positions, frames, frames, device="meta").permute(0, 2, 3, 1)
            rows = torch.empty(heads, 64, frames * positions, device="meta")
            mass = torch.empty(heads, frames * positions, device="meta")
            index = torch.empty(64, dtype=torch.int64, device="meta")
            layout = (frames, positions, shape.text, shape.text, 0)
            launch = plan(diagonal, rows, mass, query, key, lse, index, *layout, shape.width**-0.5, fold)
            label = f"motion_statistics {name} {str(dtype)[6:]} fold {fold}"
            found.append(resources.Gate(label, launch, dtype != torch.float32))
    return found
