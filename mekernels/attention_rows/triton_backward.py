"""Triton kernels of the backward of ``attention_rows``; see :mod:`mekernels.attention_rows.triton`.

With p the attention of a row and d the gradient of its entries (zero where nothing was read), the gradient of
the scores is p (d - s), and s is the sum of p d over the columns that were read. So s comes first, from the
columns alone; then each block of keys is written by one program, and the rows' part is cut along the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton import exact_dot, row_bounds, seen_keys, seen_span, token_at, vectors


@triton.jit
def half_factor(x, SCALED: tl.constexpr):
    """The largest finite entry of a product's left side where half precision is too narrow; else 1."""
    factor = 1.0
    if SCALED:
        size = tl.abs(x)
        # Neither infinity nor NaN, which would reach the rows that share a tile with it.
        size = tl.where(size < float("inf"), size, 0.0)
        factor = tl.maximum(tl.max(tl.max(size, 1), 0), 1e-30)
    return factor


@triton.jit
def offsets(along, stride, WIDE: tl.constexpr):
    """Offsets within one sample's gradient; 64 bits only where they must be, for they fill registers."""
    if WIDE:
        return along.to(tl.int64) * stride
    return along.to(tl.int32) * stride


@triton.jit
def combined_sum(partial, at, step, splits, inside, SPLITS: tl.constexpr):
    cut = tl.arange(0, SPLITS)
    held = inside[:, None] & (cut[None, :] < splits)
    return tl.sum(tl.load(partial + at[:, None] + cut[None, :] * step, mask=held, other=0.0), 1)


@triton.jit
def row_slope(
    query,
    key,
    rows,
    ranges,
    key_mask,
    columns,
    lse_in,
    rest_in,
    grad,
    partial,
    q_strides,
    k_strides,
    g_strides,
    count,
    queries,
    keys,
    own,
    width,
    start,
    splits,
    span,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over one cut of the columns of attention times gradient, (splits, B, Hk, R * GROUPS)."""
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    r, inside = m // GROUPS, m < count * GROUPS
    row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
    own_head = head * GROUPS + m % GROUPS
    at = token_at(query, q_strides, sample, own_head, row)
    q = vectors(at, valid, q_strides[3], 0, WIDTH, BLOCK_D)
    lse_at = (sample * tl.num_programs(1) * GROUPS + own_head) * count + r
    lse = tl.load(lse_in + lse_at, mask=inside, other=0.0)
    rest = tl.load(rest_in + lse_at, mask=inside, other=0.0)
    of_rows = offsets(own_head, g_strides[1], WIDE) + offsets(r, width, WIDE)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(split * span + span, width)
    for begin in range(split * span, end, BLOCK_N):
        c = begin + tl.arange(0, BLOCK_N)
        chosen = c < end
        if INDEX:
            column = tl.load(columns + sample * width + c, mask=chosen, other=-1)
            chosen = (column >= 0) & (column < own)
            column = tl.where(chosen, column, 0).to(tl.int32)
        else:
            column = tl.where(chosen, start + c, 0)
        allowed = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None]) & chosen[None, :]
        given = tl.load(
            grad + sample * g_strides[0] + (of_rows[:, None] + c[None, :]),
            mask=allowed & inside[:, None],
            other=0.0,
        )
        for part in range(FOLD):
            n = column + part * own
            _, seen = seen_keys(key_mask, sample, n, keys, own, MASK, 1)
            place = token_at(key, k_strides, sample, head, n.to(tl.int64))
            k = vectors(place, seen & chosen, k_strides[3], 0, WIDTH, BLOCK_D)
            share = tl.exp(exact_dot(q, tl.trans(k)) * scale - lse[:, None] - rest[:, None])
            total += tl.sum(tl.where(allowed & seen[None, :], share * given, 0.0), 1)
    rank = (split * tl.num_programs(2) + sample) * tl.num_programs(1) + head
    tl.store(partial + rank * count * GROUPS + m, total * grad_scale, mask=inside)


@triton.jit
def key_gradient(
    query,
    key,
    rows,
    ranges,
    key_mask,
    lse_in,
    rest_in,
    slope_in,
    grad,
    out,
    q_strides,
    k_strides,
    g_strides,
    o_strides,
    count,
    queries,
    keys,
    own,
    start,
    stop,
    splits,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one block of keys, from all stacked rows."""
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position, seen = seen_keys(key_mask, sample, n, keys, own, MASK, FOLD)
    at = token_at(key, k_strides, sample, head, n.to(tl.int64))
    k = vectors(at, seen, k_strides[3], 0, WIDTH, BLOCK_D)
    read = seen & (position >= start) & (position < stop)
    of_keys = offsets(position - start, g_strides[3], WIDE)
    stacked = (sample * tl.num_programs(1) + head) * count * GROUPS
    step = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * count * GROUPS
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first_m in range(0, count * GROUPS, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        r, inside = m // GROUPS, m < count * GROUPS
        row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
        own_head = head * GROUPS + m % GROUPS
        place = token_at(query, q_strides, sample, own_head, row)
        q = vectors(place, valid, q_strides[3], 0, WIDTH, BLOCK_D)
        lse_at = (sample * tl.num_programs(1) * GROUPS + own_head) * count + r
        lse = tl.load(lse_in + lse_at, mask=inside, other=0.0)
        rest = tl.load(rest_in + lse_at, mask=inside, other=0.0)
        slope = combined_sum(slope_in, stacked + m, step, splits, inside, SPLITS)
        allowed = seen[:, None] & (position[:, None] >= first[None, :]) & (position[:, None] < last[None, :])
        place = offsets(own_head, g_strides[1], WIDE) + offsets(r, g_strides[2], WIDE)
        given = tl.load(
            grad + sample * g_strides[0] + (place[None, :] + of_keys[:, None]),
            mask=allowed & read[:, None] & inside[None, :],
            other=0.0,
        )
        share = tl.exp(exact_dot(k, tl.trans(q)) * scale - lse[None, :] - rest[None, :])
        change = tl.where(allowed, share * (given * grad_scale - slope[None, :]), 0.0)
        factor = half_factor(change, SCALED)
        total += exact_dot((change * (1.0 / factor)).to(q.dtype), q) * factor
    d = tl.arange(0, BLOCK_D)
    at = (
        out
        + sample * o_strides[0]
        + head * o_strides[1]
        + n.to(tl.int64)[:, None] * o_strides[2]
        + d[None, :] * o_strides[3]
    )
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=(n < keys)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def query_gradient(
    query,
    key,
    rows,
    ranges,
    key_mask,
    lse_in,
    rest_in,
    slope_in,
    grad,
    partial,
    q_strides,
    k_strides,
    g_strides,
    count,
    queries,
    keys,
    own,
    start,
    stop,
    slope_splits,
    splits,
    span,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of the stacked rows from one cut of the keys, float32 (splits, B, Hk, R * GROUPS, WIDTH)."""
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    r, inside = m // GROUPS, m < count * GROUPS
    row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
    own_head = head * GROUPS + m % GROUPS
    of_queries = token_at(query, q_strides, sample, own_head, row)
    if CHUNK == BLOCK_D:
        q = vectors(of_queries, valid, q_strides[3], 0, WIDTH, BLOCK_D)
    lse_at = (sample * tl.num_programs(1) * GROUPS + own_head) * count + r
    lse = tl.load(lse_in + lse_at, mask=inside, other=0.0)
    rest = tl.load(rest_in + lse_at, mask=inside, other=0.0)
    stacked = (sample * tl.num_programs(1) + head) * count * GROUPS + m
    step = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * count * GROUPS
    slope = combined_sum(slope_in, stacked, step, slope_splits, inside, SPLITS)
    of_rows = offsets(own_head, g_strides[1], WIDE) + offsets(r, g_strides[2], WIDE)
    begin, end = seen_span(first, last, split * span, tl.minimum(split * span + span, keys), keys, FOLD)
    base = key + sample * k_strides[0] + head * k_strides[1]
    lanes = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_n in range(begin, end, BLOCK_N):
        n = first_n + lanes
        position, seen = seen_keys(key_mask, sample, n, keys, own, MASK, FOLD)
        seen &= n < end
        place = base + n.to(tl.int64) * k_strides[2]
        k = vectors(place, seen, k_strides[3], 0, WIDTH, BLOCK_D)
        read = seen & (position >= start) & (position < stop)
        allowed = seen[None, :] & (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
        given = tl.load(
            grad
            + sample * g_strides[0]
            + (of_rows[:, None] + offsets(position - start, g_strides[3], WIDE)[None, :]),
            mask=allowed & read[None, :] & inside[:, None],
            other=0.0,
        )
        if CHUNK == BLOCK_D:
            scores = exact_dot(q, tl.trans(k))
        else:
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, WIDTH, CHUNK):
                some_q = vectors(of_queries, valid, q_strides[3], d, WIDTH, CHUNK)
                some_k = vectors(place, seen, k_strides[3], d, WIDTH, CHUNK)
                scores = tl.dot(some_q, tl.trans(some_k), scores, input_precision="ieee")
        share = tl.exp(scores * scale - lse[:, None] - rest[:, None])
        change = tl.where(allowed, share * (given * grad_scale - slope[:, None]), 0.0)
        factor = half_factor(change, SCALED)
        total += exact_dot((change * (1.0 / factor)).to(k.dtype), k) * factor
    lane = tl.arange(0, BLOCK_D)
    rank = ((split * tl.num_programs(2) + sample) * tl.num_programs(1) + head) * count * GROUPS
    at = partial + (rank + m)[:, None] * WIDTH + lane[None, :]
    tl.store(at, total * scale, mask=inside[:, None] & (lane < WIDTH)[None, :])


@triton.jit
def scatter_rows(
    partial,
    ordered,
    order,
    out,
    o_strides,
    count,
    queries,
    splits,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of a query position once: the sum over the cuts and over all places that chose it.

    ``ordered`` are the rows in ascending order and ``order`` their places; the first of equal rows writes.
    """
    place = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    listed = sample * count
    row = tl.load(ordered + listed + place)
    before = tl.load(ordered + listed + place - 1, mask=place > 0, other=-1)
    d = tl.arange(0, BLOCK_D)
    kv_heads = tl.num_programs(1) // GROUPS
    stacked = (sample * kv_heads + head // GROUPS) * count * GROUPS + head % GROUPS
    step = tl.num_programs(2).to(tl.int64) * kv_heads * count * GROUPS
    total = tl.zeros([BLOCK_D], tl.float32)
    next_place = place
    writes = (row >= 0) & (row < queries) & (row != before)
    if writes:
        same = row
        while same == row:
            chosen = tl.load(order + listed + next_place)
            for split in range(splits):
                piece = partial + (stacked + chosen * GROUPS + split * step) * WIDTH + d
                total += tl.load(piece, mask=d < WIDTH, other=0.0)
            next_place += 1
            same = tl.load(ordered + listed + next_place, mask=next_place < count, other=-1)
        at = token_at(out, o_strides, sample, head, row) + d * o_strides[3]
        tl.store(at, total.to(out.dtype.element_ty), mask=d < WIDTH)
