"""One launch that adds an attention map's diagonals, whole rows and mass on video to the running sums.

The programs of a head stand together, so that its keys are still in the cache for the second kind:

- position programs take a few positions of all frames: the batched product of their queries with their keys
  gives the diagonals, the product of the same queries with the text keys the mass that is not on video;
- key programs take a block of video keys and multiply it with all chosen rows.

Every element of the sums belongs to one program, so nothing depends on the order they run in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..diagonal_attention.triton import diagonal_tile, load_tokens


@triton.jit
def text_mass(
    query,
    key,
    token,
    known,
    shift,
    query_strides,
    key_strides,
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
            q = load_tokens(query, query_strides, token, known, first, WIDTH, BLOCK_D)
            k = load_tokens(key, key_strides, other, word < text, first, WIDTH, BLOCK_D)
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
    diagonal_strides,
    vision_mass_strides,
    query_strides,
    key_strides,
    lse_strides,
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
        shift = tl.load(lse + token.to(tl.int64) * lse_strides[2], mask=known, other=0.0).to(tl.float32)
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
                query_strides,
                key_strides,
                part_tokens,
                scale,
                FOLD,
                WIDTH,
                BLOCK_P,
                BLOCK_F,
                BLOCK_D,
            )
            g = (first_key + tl.arange(0, BLOCK_F)).to(tl.int64)[None, None, :]
            place = diagonal + f * diagonal_strides[1] + g * diagonal_strides[2] + p * diagonal_strides[3]
            mask = (p < positions) & (f < frames) & (g < frames)
            tl.store(place, tl.load(place, mask=mask) + total, mask=mask)
        mass = text_mass(
            query,
            key,
            token,
            known,
            shift,
            query_strides,
            key_strides,
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
        place = vision_mass + own.to(tl.int64) * vision_mass_strides[1]
        tl.store(place, tl.load(place, mask=known) + left, mask=known)


@triton.jit
def add_rows(
    rows,
    query,
    key,
    lse,
    index,
    rows_strides,
    query_strides,
    key_strides,
    lse_strides,
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
        shift = tl.load(lse + token * lse_strides[2], mask=known, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for part in range(FOLD):
            scores = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            other = start + part * part_tokens + column
            for first in range(0, WIDTH, BLOCK_D):
                q = load_tokens(query, query_strides, token, known, first, WIDTH, BLOCK_D)
                k = load_tokens(key, key_strides, other, seen, first, WIDTH, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
            total += tl.exp(scores * scale - shift[:, None])
        place = (
            rows
            + row.to(tl.int64)[:, None] * rows_strides[1]
            + column.to(tl.int64)[None, :] * rows_strides[2]
        )
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
    diagonal_strides,
    rows_strides,
    vision_mass_strides,
    query_strides,
    key_strides,
    lse_strides,
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
    query += head * query_strides[1]
    key += head * key_strides[1]
    lse += head * lse_strides[1]
    if block < position_programs:
        add_positions(
            diagonal + head * diagonal_strides[0],
            vision_mass + head * vision_mass_strides[0],
            query,
            key,
            lse,
            diagonal_strides,
            vision_mass_strides,
            query_strides,
            key_strides,
            lse_strides,
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
            rows + head * rows_strides[0],
            query,
            key,
            lse,
            index,
            rows_strides,
            query_strides,
            key_strides,
            lse_strides,
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
