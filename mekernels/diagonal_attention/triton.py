"""Same-position attention of all frame pairs, from query, key and logsumexp.

A program takes a few positions of one head. For each position, the entries are the product of an (F, D) and a
(D, F) matrix. So a tile of positions is one batched product on the tensor cores. If all frames fit one tile
(F <= 32), query and key are read once.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_lse(pointer, stride, token, known):
    """(tokens,) logsumexp to base 2, 0 for unknown tokens."""
    value = tl.load(pointer + token.to(tl.int64) * stride, mask=known, other=0.0)
    return value.to(tl.float32) * LOG2_E


@triton.jit
def load_tokens(pointer, strides, token, known, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (tokens, BLOCK_D) values of a head from element ``first``; zero outside tokens and width."""
    width = first + tl.arange(0, BLOCK_D)
    place = token.to(tl.int64)[:, None] * strides[2] + width.to(tl.int64)[None, :] * strides[3]
    return tl.load(pointer + place, mask=known[:, None] & (width < WIDTH)[None, :], other=0.0)


@triton.jit
def add_diagonal_tile(
    total,
    query,
    key,
    query_token,
    query_known,
    lse,
    key_token,
    key_known,
    query_strides,
    key_strides,
    part_tokens,
    scale_log2,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_P, BLOCK_F, BLOCK_F) sums plus, for each position, the attention between its frames.

    ``lse`` and ``scale_log2`` are the natural-base values times log2(e).
    """
    shift = tl.reshape(lse, (BLOCK_P, BLOCK_F, 1))
    for part in range(FOLD):
        scores = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), tl.float32)
        own = key_token + part * part_tokens
        for first in range(0, WIDTH, BLOCK_D):
            q = load_tokens(query, query_strides, query_token, query_known, first, WIDTH, BLOCK_D)
            k = load_tokens(key, key_strides, own, key_known, first, WIDTH, BLOCK_D)
            k = tl.permute(tl.reshape(k, (BLOCK_P, BLOCK_F, BLOCK_D)), (0, 2, 1))
            q = tl.reshape(q, (BLOCK_P, BLOCK_F, BLOCK_D))
            scores = tl.dot(q, k, scores, input_precision="ieee")
        total += tl.exp2(scores * scale_log2 - shift)
    return total


@triton.jit(
    do_not_specialize=[
        "lse_batch",
        "lse_head",
        "lse_token",
        "heads",
        "frames",
        "positions",
        "start",
        "part_tokens",
    ],
    do_not_specialize_on_alignment=["lse"],
)
def diagonal_attention_kernel(
    out,
    query,
    key,
    lse,
    query_strides,
    key_strides,
    lse_batch,
    lse_head,
    lse_token,
    heads,
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
    """Write out (B, H, F, F, P), contiguous."""
    blocks = tl.cdiv(positions, BLOCK_P)
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    sample = (row // heads).to(tl.int64)
    query += sample * query_strides[0] + head * query_strides[1]
    key += sample * key_strides[0] + head * key_strides[1]
    lse += sample * lse_batch + head * lse_head
    out += row.to(tl.int64) * frames * frames * positions

    entry = tl.arange(0, BLOCK_P * BLOCK_F)
    first_position = tl.program_id(0) % blocks * BLOCK_P
    position = first_position + entry // BLOCK_F
    p = (first_position + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
    for first_query in range(0, frames, BLOCK_F):
        frame = first_query + entry % BLOCK_F
        query_known = (frame < frames) & (position < positions)
        query_token = start + frame * positions + position
        shift = load_lse(lse, lse_token, query_token, query_known)
        f = (first_query + tl.arange(0, BLOCK_F)).to(tl.int64)[None, :, None]
        for first_key in range(0, frames, BLOCK_F):
            other = first_key + entry % BLOCK_F
            total = add_diagonal_tile(
                tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), tl.float32),
                query,
                key,
                query_token,
                query_known,
                shift,
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
            g = (first_key + tl.arange(0, BLOCK_F)).to(tl.int64)[None, None, :]
            mask = (p < positions) & (f < frames) & (g < frames)
            tl.store(out + f * frames * positions + g * positions + p, total, mask=mask)
