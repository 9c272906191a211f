"""Triton kernels of ``attention_rows``: what runs on the device, and nothing of how it is called.

The chosen rows of all query heads that share a key head are stacked, ``row * GROUPS + head of the group``, so
that one matrix product with a tile of keys serves them all and keys are never repeated. Work is cut along the
keys too; every cut writes its own partial result, which the next kernel combines in a fixed order. No kernel
adds to memory that another program writes, so results do not change from run to run.

Each row sees the keys ``first <= position < last`` of every part of the key axis; a causal mask, packed
sequences and padded rows are all such bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL: tl.constexpr, RANGE: tl.constexpr):
    """Query positions of the places ``r``, which are valid, and the keys they see: an invalid row none."""
    inside = r < count
    row = tl.load(rows + sample * count + r, mask=inside, other=-1)
    valid = (row >= 0) & (row < queries)
    row = tl.where(valid, row, 0)
    first = tl.zeros_like(row)
    last = tl.zeros_like(row) + own
    if CAUSAL:
        last = tl.minimum(last, row + 1 + own - queries)
    if RANGE:
        at = ranges + (sample * count + r) * 2
        first = tl.maximum(first, tl.load(at, mask=inside, other=0))
        last = tl.minimum(last, tl.load(at + 1, mask=inside, other=0))
    # Bounds may be any 64-bit number; those of the keys fit 32.
    first = tl.minimum(first, own)
    last = tl.maximum(tl.where(valid, last, 0), 0)
    return row, valid, first.to(tl.int32), last.to(tl.int32)


@triton.jit
def token_at(pointer, strides, sample, head, token):
    """Addresses of vectors in (batch, heads, tokens, width)."""
    return pointer + sample * strides[0] + head * strides[1] + token * strides[2]


@triton.jit
def vectors(at, inside, stride, begin, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements from ``begin`` on of the vectors at the addresses ``at``, zero beyond their ``WIDTH``."""
    d = begin + tl.arange(0, BLOCK_D)
    places = at[:, None] + d[None, :] * stride
    if BLOCK_D == WIDTH:
        return tl.load(places, mask=inside[:, None], other=0.0)
    return tl.load(places, mask=inside[:, None] & (d[None, :] < WIDTH), other=0.0)


@triton.jit
def seen_keys(key_mask, sample, n, keys, own, MASK: tl.constexpr, FOLD: tl.constexpr):
    """Positions of the keys ``n`` within their part, and whether any row may see them."""
    seen = n < keys
    if MASK:
        seen &= tl.load(key_mask + sample * keys + n, mask=seen, other=0) != 0
    position = n
    if FOLD > 1:
        position = n % own
    return position, seen


@triton.jit
def exact_dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def combined_rows(tops, totals, at, step, splits, inside, SPLITS: tl.constexpr):
    """Largest score of a row, and the sum of the exponentials above it, from those of the cuts."""
    cut = tl.arange(0, SPLITS)
    held = inside[:, None] & (cut[None, :] < splits)
    places = at[:, None] + cut[None, :] * step
    top = tl.load(tops + places, mask=held, other=-float("inf"))
    total = tl.load(totals + places, mask=held, other=0.0)
    highest = tl.max(top, 1)
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    return safe, tl.sum(total * tl.exp(top - safe[:, None]), 1)


@triton.jit
def seen_span(first, last, begin, end, keys, FOLD: tl.constexpr):
    """The keys of a cut that at least one of the rows sees."""
    if FOLD == 1:
        begin = tl.maximum(begin, tl.min(tl.where(last > first, first, keys), 0))
        end = tl.minimum(end, tl.max(last, 0))
    return begin, end


@triton.jit
def row_lse(
    query,
    key,
    rows,
    ranges,
    key_mask,
    tops,
    totals,
    q_strides,
    k_strides,
    count,
    queries,
    keys,
    own,
    splits,
    span,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Largest scores and sums of exponentials over one cut of the keys, (splits, B, Hk, R * GROUPS)."""
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
    begin, end = seen_span(first, last, split * span, tl.minimum(split * span + span, keys), keys, FOLD)
    base = key + sample * k_strides[0] + head * k_strides[1]
    lanes = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + lanes
        position, seen = seen_keys(key_mask, sample, n, keys, own, MASK, FOLD)
        seen &= n < end
        place = base + n.to(tl.int64) * k_strides[2]
        k = vectors(place, seen, k_strides[3], 0, WIDTH, BLOCK_D)
        scores = exact_dot(q, tl.trans(k)) * scale
        allowed = seen[None, :] & (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
        scores = tl.where(allowed, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
        top = higher
    rank = (split * tl.num_programs(2) + sample) * tl.num_programs(1) + head
    tl.store(tops + rank * count * GROUPS + m, top, mask=inside)
    tl.store(totals + rank * count * GROUPS + m, total, mask=inside)


@triton.jit
def row_columns(
    query,
    key,
    rows,
    ranges,
    key_mask,
    columns,
    tops,
    totals,
    lse_out,
    rest_out,
    out,
    q_strides,
    k_strides,
    count,
    queries,
    keys,
    own,
    kv_heads,
    width,
    start,
    splits,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    MEAN: tl.constexpr,
    INDEX: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Chosen columns of the chosen rows, mean over the heads or per head, and the rows' logsumexp."""
    heads = kv_heads * GROUPS
    sample = tl.program_id(2).to(tl.int64)
    first_kv, kvs, first_group = 0, kv_heads, 0
    if not MEAN:
        sample = (tl.program_id(2) // heads).to(tl.int64)
        first_kv, kvs = (tl.program_id(2) % heads) // GROUPS, 1
        first_group = (tl.program_id(2) % heads) % GROUPS
    batch = tl.num_programs(2)
    if not MEAN:
        batch = batch // heads
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < count
    row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chosen = c < width
    if INDEX:
        column = tl.load(columns + sample * width + c, mask=chosen, other=-1)
        chosen = (column >= 0) & (column < own)
        column = tl.where(chosen, column, 0).to(tl.int32)
    else:
        column = tl.where(chosen, start + c, 0)
    allowed = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
    mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(kvs * FOLD):
        kv = tl.cast(first_kv + item // FOLD, tl.int64)
        n = column + (item % FOLD) * own
        _, seen = seen_keys(key_mask, sample, n, keys, own, MASK, 1)
        seen &= chosen
        k = vectors(
            token_at(key, k_strides, sample, kv, n.to(tl.int64)), seen, k_strides[3], 0, WIDTH, BLOCK_D
        )
        k = tl.trans(k)
        groups: tl.constexpr = GROUPS if MEAN else 1
        for group in range(groups):
            g = first_group + group
            place = token_at(query, q_strides, sample, kv * GROUPS + g, row)
            q = vectors(place, valid, q_strides[3], 0, WIDTH, BLOCK_D)
            stacked = (sample * kv_heads + kv) * count * GROUPS + r * GROUPS + g
            step = tl.cast(batch, tl.int64) * kv_heads * count * GROUPS
            top, total = combined_rows(tops, totals, stacked, step, splits, inside, SPLITS)
            # A row that is not finite has a sum that is NaN, and is NaN at every column.
            some = total != 0
            total = tl.where(some, total, 1.0)
            lse = top + tl.log(total)
            # The rounding of the logsumexp, which is large where scores are.
            rest = (top - lse) + tl.log(total)
            writes = inside & (tl.program_id(0) == 0) & (item % FOLD == 0)
            of_row = (sample * heads + kv * GROUPS + g) * count + r
            tl.store(lse_out + of_row, tl.where(some, lse, -float("inf")), mask=writes)
            tl.store(rest_out + of_row, rest, mask=writes)
            weights = tl.exp(exact_dot(q, k) * scale - top[:, None])
            mass += tl.where(allowed & seen[None, :], weights, 0.0) / total[:, None]
    rank = sample
    if MEAN:
        mass = mass / heads
    else:
        rank = sample * heads + first_kv * GROUPS + first_group
    at = out + (rank * count + r[:, None]) * width + c[None, :]
    tl.store(at, tl.where(chosen[None, :], mass, 0.0), mask=inside[:, None] & (c < width)[None, :])
