"""Triton kernels of the backward of ``attention_rows``; see :mod:`mekernels.attention_rows.triton`.

Let p be the attention of a row and d the gradient of its entries (zero where nothing was read). The gradient
of the scores is p (d - s), where s is the sum of p d over the columns that were read. The first kernel
computes s from the columns alone. The next gathers all values of a row that the two passes over the scores
need, stacked and padded, so that the passes read them without a mask. One program writes each block of keys.
The pass for the rows is cut along the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton import (
    VARYING,
    biased,
    capped,
    exact_dot,
    exponential,
    row_bounds,
    seen_keys,
    seen_span,
    tanh,
    token_at,
    vectors,
)

PADDED = tl.constexpr(64)
"""The gathered rows of a key head are padded to a multiple of this, the largest tile."""


@triton.jit
def scaled_dot(a, b, SCALED: tl.constexpr):
    """The product in the dtype of ``b``. If it is too narrow for ``a``, rows of ``a`` are scaled first."""
    if not SCALED:
        return exact_dot(a.to(b.dtype), b)
    size = tl.abs(a)
    # Neither infinity nor NaN.
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 1)
    largest = tl.maximum(largest, 1e-30)[:, None]
    return exact_dot((a * (1.0 / largest)).to(b.dtype), b) * largest


@triton.jit
def offsets(along, stride, WIDE: tl.constexpr):
    """Offsets within one sample's gradient, with 64 bits only if needed, to save registers."""
    if WIDE:
        return along.to(tl.int64) * stride
    return along.to(tl.int32) * stride


@triton.jit
def grad_list(sample, head, GROUPS: tl.constexpr, MEAN: tl.constexpr):
    """Index of a query head's (rows, columns) gradient. If the heads are averaged, all heads share it."""
    if MEAN:
        return tl.zeros_like(head) + sample
    return sample * tl.num_programs(1) * GROUPS + head


@triton.jit(do_not_specialize=VARYING)
def row_slope(
    query,
    key,
    rows,
    ranges,
    key_mask,
    bias,
    columns,
    lse_in,
    rest_in,
    grad,
    partial,
    q_strides,
    k_strides,
    b_strides,
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
    MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
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
    of_rows = grad + offsets(grad_list(sample, own_head, GROUPS, MEAN) * count + r, width, WIDE)
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
        given = tl.load(of_rows[:, None] + c[None, :], mask=allowed & inside[:, None], other=0.0)
        for part in range(FOLD):
            n = column + part * own
            _, seen = seen_keys(key_mask, sample, n, keys, own, MASK, 1)
            place = token_at(key, k_strides, sample, head, n.to(tl.int64))
            k = vectors(place, seen & chosen, k_strides[3], 0, WIDTH, BLOCK_D)
            scores = capped(exact_dot(q, tl.trans(k)) * scale, SOFTCAP)
            shown = allowed & seen[None, :]
            scores, shown = biased(
                scores, bias, b_strides, sample, own_head[:, None], r[:, None], n[None, :], shown, BIAS
            )
            share = exponential(scores - lse[:, None] - rest[:, None])
            total += tl.sum(tl.where(shown, share * given, 0.0), 1)
    rank = (split * tl.num_programs(2) + sample) * tl.num_programs(1) + head
    tl.store(partial + rank * count * GROUPS + m, total * grad_scale, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def spread_columns(grad, ordered, begins, out, count, own, width, LISTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradients of listed columns at the positions of a part, (B, 1 or Hq, R, own); equal columns are added.

    ``ordered`` are the (B, C) indices that sort the list by column. ``begins`` are the (B, own + 1) first
    indices of each column.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    sample = row // (count * LISTS)
    begin = tl.load(begins + sample * (own + 1) + n, mask=n < own, other=0)
    end = tl.load(begins + sample * (own + 1) + n + 1, mask=n < own, other=0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for repeat in range(tl.max(end - begin, 0).to(tl.int32)):
        held = begin + repeat < end
        column = tl.load(ordered + sample * width + begin + repeat, mask=held, other=0)
        total += tl.load(grad + row * width + column, mask=held, other=0.0)
    tl.store(out + row * own + n, total, mask=n < own)


@triton.jit(do_not_specialize=VARYING)
def gather_rows(
    query,
    rows,
    ranges,
    lse_in,
    rest_in,
    slope_in,
    packed,
    measures,
    bounds,
    places,
    q_strides,
    count,
    queries,
    own,
    width,
    splits,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gather the values of the stacked rows for the passes over the scores, padded with rows that see no key.

    ``packed``: the queries (B, Hk, M, BLOCK_D). ``measures``: logsumexp, its rest to base 2, and the slope
    (3, B, Hk, M). ``bounds``: the first key seen and one past the last (2, B, Hk, M). ``places``: the offset
    of the gradients of a row (B, Hk, M).
    """
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, inside = m // GROUPS, m < count * GROUPS
    row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
    own_head = head * GROUPS + m % GROUPS
    at = token_at(query, q_strides, sample, own_head, row)
    q = vectors(at, valid, q_strides[3], 0, WIDTH, BLOCK_D)
    of_row = (sample * tl.num_programs(1) * GROUPS + own_head) * count + r
    lse = tl.load(lse_in + of_row, mask=inside, other=0.0)
    rest = tl.load(rest_in + of_row, mask=inside, other=0.0)
    slope = tl.zeros([BLOCK_M], tl.float32)
    lists = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    rank = sample * tl.num_programs(1) + head
    for split in range(splits):
        piece = slope_in + (split * lists + rank) * count * GROUPS + m
        slope += tl.load(piece, mask=inside, other=0.0)
    place = grad_list(sample, own_head, GROUPS, MEAN)
    place = offsets(place * count + r, width, WIDE)
    padded = tl.cdiv(count * GROUPS, PADDED) * PADDED
    at = rank * padded + m
    tl.store(packed + (at[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]), q)
    tl.store(measures + at, lse)
    tl.store(measures + lists * padded + at, rest * 1.4426950408889634)
    tl.store(measures + 2 * lists * padded + at, slope)
    tl.store(bounds + at, first)
    tl.store(bounds + lists * padded + at, last)
    tl.store(places + at, tl.where(inside, place, 0))


@triton.jit
def gathered(measures, bounds, places, at, plane, RANGE: tl.constexpr):
    """Logsumexp, its rest, slope, bounds and offset of the gradients, of the gathered rows ``at``."""
    lse = tl.load(measures + at)
    rest = tl.load(measures + plane + at)
    slope = tl.load(measures + 2 * plane + at)
    last = tl.load(bounds + plane + at)
    first = tl.zeros_like(last)
    if RANGE:
        first = tl.load(bounds + at)
    return lse, rest, slope, first, last, tl.load(places + at)


@triton.jit
def visible(position, first, last, RANGE: tl.constexpr):
    """Whether rows see keys. No row sees a key at the largest representable position."""
    if RANGE:
        return (position >= first) & (position < last)
    return position < last


@triton.jit
def score_gradient(
    scores,
    bias,
    strides,
    sample,
    head,
    row,
    key,
    lse,
    rest,
    given,
    slope,
    seen,
    scale,
    grad_scale,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """p (d - s) where a row sees a key, else zero; ``CAPPED`` is the gradient after the soft cap."""
    scores = scores * scale
    if SOFTCAP > 0:
        bent = tanh(scores * (1 / SOFTCAP))
        scores = SOFTCAP * bent
    scores, seen = biased(scores, bias, strides, sample, head, row, key, seen, BIAS)
    share = tl.exp2((scores - lse) * 1.4426950408889634 - rest)
    if SOFTCAP > 0 and not CAPPED:
        share = share * (1.0 - bent * bent)
    return tl.where(seen, share * (given * grad_scale - slope), 0.0)


@triton.jit(do_not_specialize=VARYING)
def key_gradient(
    packed,
    measures,
    bounds,
    places,
    key,
    key_mask,
    bias,
    grad,
    out,
    k_strides,
    b_strides,
    o_strides,
    count,
    keys,
    own,
    start,
    stop,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
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
    of_keys = grad + (position - start)
    position = tl.where(seen, position, 2147483647)
    d = tl.arange(0, BLOCK_D)
    padded = tl.cdiv(count * GROUPS, PADDED) * PADDED
    rank = sample * tl.num_programs(1) + head
    plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * padded
    base = rank * padded
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first_m in range(0, count * GROUPS, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        q = tl.load(packed + base * BLOCK_D + (m[:, None] * BLOCK_D + d[None, :]))
        lse, rest, slope, first, last, place = gathered(
            measures + base, bounds + base, places + base, m, plane, RANGE
        )
        given = tl.load(of_keys[:, None] + place[None, :], mask=read[:, None], other=0.0)
        change = score_gradient(
            *(exact_dot(k, tl.trans(q)), bias, b_strides, sample, (head * GROUPS + m % GROUPS)[None, :]),
            *((m // GROUPS)[None, :], n[:, None], lse[None, :], rest[None, :], given),
            *(slope[None, :], visible(position[:, None], first[None, :], last[None, :], RANGE)),
            *(scale, grad_scale, SOFTCAP, BIAS, False),
        )
        total += scaled_dot(change, q, SCALED)
    at = (
        out
        + sample * o_strides[0]
        + head * o_strides[1]
        + n.to(tl.int64)[:, None] * o_strides[2]
        + d[None, :] * o_strides[3]
    )
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=(n < keys)[:, None] & (d < WIDTH)[None, :])


@triton.jit(do_not_specialize=VARYING)
def query_gradient(
    packed,
    measures,
    bounds,
    places,
    key,
    key_mask,
    bias,
    grad,
    partial,
    k_strides,
    b_strides,
    count,
    keys,
    own,
    start,
    stop,
    splits,
    span,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
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
    padded = tl.cdiv(count * GROUPS, PADDED) * PADDED
    plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * padded
    base = (sample * tl.num_programs(1) + head) * padded
    lse, rest, slope, first, last, place = gathered(
        measures + base, bounds + base, places + base, m, plane, RANGE
    )
    of_queries = packed + (base + m) * BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    if CHUNK == BLOCK_D:
        q = tl.load(of_queries[:, None] + lane[None, :])
    of_rows = grad + place
    begin, end = seen_span(first, last, split * span, tl.minimum(split * span + span, keys), keys, FOLD)
    base_key = key + sample * k_strides[0] + head * k_strides[1]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_n in range(begin, end, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        position, seen = seen_keys(key_mask, sample, n, keys, own, MASK, FOLD)
        seen &= n < end
        at = base_key + n.to(tl.int64) * k_strides[2]
        k = vectors(at, seen, k_strides[3], 0, WIDTH, BLOCK_D)
        read = seen & (position >= start) & (position < stop)
        given = tl.load(of_rows[:, None] + (position - start)[None, :], mask=read[None, :], other=0.0)
        if CHUNK == BLOCK_D:
            scores = exact_dot(q, tl.trans(k))
        else:
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for begin_d in range(0, WIDTH, CHUNK):
                some_q = tl.load(of_queries[:, None] + (begin_d + tl.arange(0, CHUNK))[None, :])
                some_k = vectors(at, seen, k_strides[3], begin_d, WIDTH, CHUNK)
                scores = tl.dot(some_q, tl.trans(some_k), scores, input_precision="ieee")
        position = tl.where(seen, position, 2147483647)
        change = score_gradient(
            *(scores, bias, b_strides, sample, (head * GROUPS + m % GROUPS)[:, None]),
            *((m // GROUPS)[:, None], n[None, :], lse[:, None], rest[:, None], given),
            *(slope[:, None], visible(position[None, :], first[:, None], last[:, None], RANGE)),
            *(scale, grad_scale, SOFTCAP, BIAS, False),
        )
        total += scaled_dot(change, k, SCALED)
    rank = ((split * tl.num_programs(2) + sample) * tl.num_programs(1) + head) * count * GROUPS
    at = partial + (rank + m)[:, None] * WIDTH + lane[None, :]
    inside = m < count * GROUPS
    tl.store(at, total * scale, mask=inside[:, None] & (lane < WIDTH)[None, :])


@triton.jit(do_not_specialize=VARYING)
def scatter_rows(
    partial,
    rows,
    out,
    o_strides,
    count,
    queries,
    splits,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write the gradient of each query position once: the sum over the cuts and over all rows that chose it.

    Of equal rows, the first one writes.
    """
    place = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    listed = rows + sample * count
    row = tl.load(listed + place)
    d = tl.arange(0, BLOCK_D)
    kv_heads = tl.num_programs(1) // GROUPS
    stacked = (sample * kv_heads + head // GROUPS) * count * GROUPS + head % GROUPS
    step = tl.num_programs(2).to(tl.int64) * kv_heads * count * GROUPS
    earlier = 0
    for begin in range(0, place, BLOCK_R):
        other = begin + tl.arange(0, BLOCK_R)
        equal = tl.load(listed + other, mask=other < place, other=-1) == row
        earlier += tl.sum(equal.to(tl.int32), 0)
    if (row >= 0) & (row < queries) & (earlier == 0):
        total = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(place // BLOCK_R * BLOCK_R, count, BLOCK_R):
            other = begin + tl.arange(0, BLOCK_R)
            equal = tl.load(listed + other, mask=other < count, other=-1) == row
            left = tl.sum(equal.to(tl.int32), 0)
            chosen = begin - 1
            while left > 0:
                chosen = tl.min(tl.where(equal & (other > chosen), other, count), 0)
                for split in range(splits):
                    piece = partial + (stacked + chosen * GROUPS + split * step) * WIDTH + d
                    total += tl.load(piece, mask=d < WIDTH, other=0.0)
                left -= 1
        at = token_at(out, o_strides, sample, head, row) + d * o_strides[3]
        tl.store(at, total.to(out.dtype.element_ty), mask=d < WIDTH)
