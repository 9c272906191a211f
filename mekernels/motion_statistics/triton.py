"""One launch that adds the diagonals, whole rows and mass on video of one or more maps to the running sums.

The programs of a head follow each other, so that its tokens are still in the cache for the later kinds:

- position programs take a few positions of all frames: the batched product of their queries with their keys
  gives the diagonals;
- key programs take a block of video keys and multiply it with all chosen rows;
- query programs take a block of video queries; their product with the text keys gives the mass not on video.

A program reads its sums once, adds one map after the other, and writes the sums once. One program writes each
element of the sums, so the result does not depend on the order of the programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..diagonal_attention.triton import add_diagonal_tile, load_lse, load_tokens


@triton.jit
def of_map(first, more, place):
    """The tensor of a map, selected by comparisons because a tuple cannot be indexed at run time."""
    found = first
    for other in tl.static_range(len(more)):
        found = tl.where(place == other + 1, more[other], found)
    return found


@triton.jit
def load_shift(lse, stride, token, known):
    """(tokens,) logsumexp to base 2; NaN where it is infinite, since such a row has no softmax."""
    shift = load_lse(lse, stride, token, known)
    return tl.where(tl.abs(shift) < float("inf"), shift, float("nan"))


@triton.jit
def weights_tile(
    query,
    key,
    query_token,
    query_known,
    shift,
    key_token,
    key_known,
    query_strides,
    key_strides,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_Q, BLOCK_K) attention of queries to keys."""
    scores = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for first in range(0, WIDTH, BLOCK_D):
        q = load_tokens(query, query_strides, query_token, query_known, first, WIDTH, BLOCK_D)
        k = load_tokens(key, key_strides, key_token, key_known, first, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    return tl.exp2(scores * scale_log2 - shift[:, None])


@triton.jit
def add_diagonal(
    diagonal,
    query,
    key,
    lse,
    more_queries,
    more_keys,
    more_lse,
    diagonal_strides,
    query_strides,
    key_strides,
    lse_token,
    offsets,
    block,
    maps,
    frames,
    positions,
    start,
    part_tokens,
    scale_log2,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Diagonals (F, F, P) of one head for a few positions."""
    entry = tl.arange(0, BLOCK_P * BLOCK_F)
    position = block * BLOCK_P + entry // BLOCK_F
    p = (block * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
    for first_query in range(0, frames, BLOCK_F):
        frame = first_query + entry % BLOCK_F
        known = (frame < frames) & (position < positions)
        token = start + frame * positions + position
        f = (first_query + tl.arange(0, BLOCK_F)).to(tl.int64)[None, :, None]
        for first_key in range(0, frames, BLOCK_F):
            other = first_key + entry % BLOCK_F
            g = (first_key + tl.arange(0, BLOCK_F)).to(tl.int64)[None, None, :]
            place = diagonal + f * diagonal_strides[0] + g * diagonal_strides[1] + p * diagonal_strides[2]
            mask = (p < positions) & (f < frames) & (g < frames)
            total = tl.load(place, mask=mask, other=0.0)
            for one in range(maps):
                total = add_diagonal_tile(
                    total,
                    of_map(query, more_queries, one) + offsets[0],
                    of_map(key, more_keys, one) + offsets[1],
                    token,
                    known,
                    load_shift(of_map(lse, more_lse, one) + offsets[2], lse_token, token, known),
                    start + other * positions + position,
                    (other < frames) & (position < positions),
                    query_strides,
                    key_strides,
                    part_tokens,
                    scale_log2,
                    FOLD,
                    WIDTH,
                    BLOCK_P,
                    BLOCK_F,
                    BLOCK_D,
                )
            tl.store(place, total, mask=mask)


@triton.jit
def add_rows(
    rows,
    query,
    key,
    lse,
    more_queries,
    more_keys,
    more_lse,
    index,
    rows_strides,
    query_strides,
    key_strides,
    lse_token,
    offsets,
    block,
    maps,
    count,
    vision,
    start,
    part_tokens,
    scale_log2,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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
        place = (
            rows
            + row.to(tl.int64)[:, None] * rows_strides[1]
            + column.to(tl.int64)[None, :] * rows_strides[2]
        )
        mask = known[:, None]
        if not PADDED:
            mask &= seen[None, :]
        total = tl.load(place, mask=mask, other=0.0)
        for one in range(maps):
            q = of_map(query, more_queries, one) + offsets[0]
            k = of_map(key, more_keys, one) + offsets[1]
            shift = load_shift(of_map(lse, more_lse, one) + offsets[2], lse_token, token, known)
            for part in range(FOLD):
                total += weights_tile(
                    q,
                    k,
                    token,
                    known,
                    shift,
                    start + part * part_tokens + column,
                    seen,
                    query_strides,
                    key_strides,
                    scale_log2,
                    WIDTH,
                    BLOCK_R,
                    BLOCK_N,
                    BLOCK_D,
                )
        tl.store(place, total, mask=mask)


@triton.jit
def add_vision_mass(
    vision_mass,
    query,
    key,
    lse,
    more_queries,
    more_keys,
    more_lse,
    mass_token,
    query_strides,
    key_strides,
    lse_token,
    offsets,
    block,
    maps,
    vision,
    start,
    text,
    text_start,
    part_tokens,
    scale_log2,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mass on video (S,) of one head for a block of video queries: one minus the mass on all text keys."""
    own = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    known = own < vision
    place = vision_mass + own.to(tl.int64) * mass_token
    total = tl.load(place, mask=known, other=0.0)
    for one in range(maps):
        q = of_map(query, more_queries, one) + offsets[0]
        k = of_map(key, more_keys, one) + offsets[1]
        shift = load_shift(of_map(lse, more_lse, one) + offsets[2], lse_token, start + own, known)
        # Without text the mass is one, and NaN where the row has no softmax.
        mass = shift - shift
        for part in range(FOLD):
            for first in range(0, text, BLOCK_T):
                word = first + tl.arange(0, BLOCK_T)
                weights = weights_tile(
                    q,
                    k,
                    start + own,
                    known,
                    shift,
                    text_start + part * part_tokens + word,
                    word < text,
                    query_strides,
                    key_strides,
                    scale_log2,
                    WIDTH,
                    BLOCK_Q,
                    BLOCK_T,
                    BLOCK_D,
                )
                mass += tl.sum(tl.where((word < text)[None, :], weights, 0.0), 1)
        total += tl.maximum(1.0 - mass, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, total, mask=known)


@triton.jit(
    do_not_specialize=[
        "diagonal_head",
        "diagonal_query",
        "diagonal_key",
        "diagonal_position",
        "mass_head",
        "mass_token",
        "lse_head",
        "lse_token",
        "count",
        "frames",
        "positions",
        "start",
        "text",
        "text_start",
        "part_tokens",
    ],
    do_not_specialize_on_alignment=["diagonal", "vision_mass", "lse", "index"],
)
def motion_statistics_kernel(
    diagonal,
    rows,
    vision_mass,
    query,
    key,
    lse,
    more_queries,
    more_keys,
    more_lse,
    index,
    rows_strides,
    query_strides,
    key_strides,
    diagonal_head,
    diagonal_query,
    diagonal_key,
    diagonal_position,
    mass_head,
    mass_token,
    lse_head,
    lse_token,
    maps,
    count,
    frames,
    positions,
    start,
    text,
    text_start,
    part_tokens,
    scale_log2,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add maps to diagonal (H, F, F, P), rows (H, R, S or more) and vision_mass (H, S)."""
    position_programs = tl.cdiv(positions, BLOCK_P)
    key_programs = tl.cdiv(frames * positions, BLOCK_N)
    programs = position_programs + key_programs + tl.cdiv(frames * positions, BLOCK_Q)
    head = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    offsets = (head * query_strides[1], head * key_strides[1], head * lse_head)
    if block < position_programs:
        add_diagonal(
            diagonal + head * diagonal_head,
            query,
            key,
            lse,
            more_queries,
            more_keys,
            more_lse,
            (diagonal_query, diagonal_key, diagonal_position),
            query_strides,
            key_strides,
            lse_token,
            offsets,
            block,
            maps,
            frames,
            positions,
            start,
            part_tokens,
            scale_log2,
            FOLD,
            WIDTH,
            BLOCK_P,
            BLOCK_F,
            BLOCK_D,
        )
    elif block < position_programs + key_programs:
        add_rows(
            rows + head * rows_strides[0],
            query,
            key,
            lse,
            more_queries,
            more_keys,
            more_lse,
            index,
            rows_strides,
            query_strides,
            key_strides,
            lse_token,
            offsets,
            block - position_programs,
            maps,
            count,
            frames * positions,
            start,
            part_tokens,
            scale_log2,
            FOLD,
            WIDTH,
            PADDED,
            BLOCK_R,
            BLOCK_N,
            BLOCK_D,
        )
    else:
        add_vision_mass(
            vision_mass + head * mass_head,
            query,
            key,
            lse,
            more_queries,
            more_keys,
            more_lse,
            mass_token,
            query_strides,
            key_strides,
            lse_token,
            offsets,
            block - position_programs - key_programs,
            maps,
            frames * positions,
            start,
            text,
            text_start,
            part_tokens,
            scale_log2,
            FOLD,
            WIDTH,
            BLOCK_Q,
            BLOCK_T,
            BLOCK_D,
        )
