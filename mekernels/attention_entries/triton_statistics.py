"""The Triton kernel that reads statistics of rows, a block of rows in a program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_rows.triton import vectors
from .triton import VARYING, inner_block, inner_span, key_places, outer_block


@triton.jit
def frame_places(token, first, stop, period, outside):
    """Places of tokens in the frames of a video; ``outside`` for other tokens."""
    return tl.where((token >= first) & (token < stop), (token - first) % period, outside)


@triton.jit(do_not_specialize=VARYING)
def row_statistics_kernel(
    query,
    key,
    lse,
    places,
    bias,
    ranges,
    entropy,
    distance,
    along,
    q_strides,
    k_strides,
    b_strides,
    rows,
    keys,
    start,
    shift,
    lower,
    upper,
    first,
    stop,
    period,
    band,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    FOLD: tl.constexpr,
    DIAGONALS: tl.constexpr,
    APART: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Entropy, mean distance and share on the diagonals of every row's attention, each (B, Hq, R)."""
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    rank = sample * tl.num_programs(1) + head
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    of_lse = lse + rank * rows
    at, row, known, sums = outer_block(
        *(query, key, of_lse, places, q_strides, k_strides, sample, head, o, rows, keys, start),
        *(GROUPS, LISTED, False),
    )
    outer = vectors(at, known, q_strides[3], 0, WIDTH, CHUNK)
    # All keys are there, in order, part by part.
    own = keys // FOLD
    begin, end = inner_span(
        *(o, row, rows, own, start, ranges, sample, lower, upper, LOWER, UPPER, RANGE, LISTED, False)
    )
    spread = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    apart = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    if DIAGONALS:
        # A tile of sums, as the others have, would take registers that wide heads need.
        same = tl.zeros([BLOCK_O], tl.float32)
        row_place = frame_places(row + shift, first, stop, period, -APART)
    for begun in range(begin, end, BLOCK_I):
        i = begun + tl.arange(0, BLOCK_I)
        weights = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for part in tl.static_range(FOLD):
            c = tl.where(i < own, i + part * own, keys) if FOLD > 1 else i
            more, _, _, _, _ = inner_block(
                *(query, key, of_lse, places, bias, ranges, q_strides, k_strides, b_strides, sample, head, o),
                *(c, at, outer, row, known, sums, rows, keys, start, lower, upper, scale, GROUPS, WIDTH),
                *(LOWER, UPPER, RANGE, SOFTCAP, BIAS, LISTED, False, CHUNK, BLOCK_O, BLOCK_I, BLOCK_D),
            )
            weights = more if part == 0 else weights + more
        # A mask may hide a key in the first part alone.
        place = start + i if FOLD > 1 else key_places(places, sample, i, keys, start, LISTED)
        apart += weights * tl.abs(place[None, :] - row[:, None] - shift).to(tl.float32)
        if DIAGONALS:
            key_place = frame_places(i, first, stop, period, APART)
            near = tl.abs(key_place[None, :] - row_place[:, None]) <= band
            same += tl.sum(tl.where(near, weights, 0.0), 1)
        # log(0) is avoided: 0 · log(0) is NaN.
        spread -= weights * tl.log(tl.maximum(weights, 1e-30))
    tl.store(entropy + rank * rows + o, tl.sum(spread, 1), mask=known)
    tl.store(distance + rank * rows + o, tl.sum(apart, 1), mask=known)
    if DIAGONALS:
        tl.store(along + rank * rows + o, same, mask=known)
