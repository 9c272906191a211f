"""Same-position attention of all frame pairs, from query, key and logsumexp.

A program takes a few positions of one head. For each position the entries are the product of a (F, D) by a
(D, F) matrix, so a tile of positions is one batched product on the tensor cores, and query and key are read
once where all frames fit one tile (F <= 32).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tokens(pointer, strides, token, known, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) values of a head from ``first`` on, zero for unknown tokens and beyond the width."""
    width = first + tl.arange(0, BLOCK_D)
    place = token.to(tl.int64)[:, None] * strides[2] + width.to(tl.int64)[None, :] * strides[3]
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
    query_strides,
    key_strides,
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
            q = load_tokens(query, query_strides, query_token, query_known, first, WIDTH, BLOCK_D)
            k = load_tokens(key, key_strides, own, key_known, first, WIDTH, BLOCK_D)
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
    out_strides,
    query_strides,
    key_strides,
    lse_strides,
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
    query += sample * query_strides[0] + head * query_strides[1]
    key += sample * key_strides[0] + head * key_strides[1]
    lse += sample * lse_strides[0] + head * lse_strides[1]
    out += sample * out_strides[0] + head * out_strides[1]

    entry = tl.arange(0, BLOCK_P * BLOCK_F)
    first_position = tl.program_id(0) % blocks * BLOCK_P
    position = first_position + entry // BLOCK_F
    p = (first_position + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
    for first_query in range(0, frames, BLOCK_F):
        frame = first_query + entry % BLOCK_F
        query_known = (frame < frames) & (position < positions)
        query_token = start + frame * positions + position
        place = lse + query_token.to(tl.int64) * lse_strides[2]
        shift = tl.load(place, mask=query_known, other=0.0).to(tl.float32)
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
            mask = (p < positions) & (f < frames) & (g < frames)
            tl.store(out + f * out_strides[2] + g * out_strides[3] + p * out_strides[4], total, mask=mask)
