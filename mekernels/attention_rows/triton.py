"""Triton kernels of ``attention_rows``; ``plan.py`` says how they are launched.

The chosen rows of all query heads that share a key head are stacked, ``row * GROUPS + head of the group``, so
that one matrix product with a tile of keys serves all of them and keys are never repeated. The keys are also
cut into parts. Every cut writes a partial result, and the next kernel combines these in a fixed order. No two
programs write to the same memory, so results do not change from run to run.

Each row sees the keys ``first <= position < last`` of every part of the key axis. A causal mask, packed
sequences and padded rows are all expressed by these bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = [
    *("count", "queries", "keys", "own", "start", "stop", "width", "splits", "span", "size", "kv_heads"),
    *("rows", "ranges", "columns", "key_mask", "bias", "sinks", "lse_in", "rest_in", "grad"),
]
"""Numbers that vary from call to call, and tensors with any alignment.

Triton does not specialize a kernel on their divisors. Inside a tuple it would specialize nevertheless."""


@triton.jit
def row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL: tl.constexpr, RANGE: tl.constexpr):
    """Query positions of the rows ``r``, which are valid, and their key bounds. An invalid row sees none."""
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
    """Elements of the vectors at addresses ``at``, starting at ``begin``; zero beyond ``WIDTH``."""
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
def exponential(x):
    """e to the power of x. ``tl.exp`` would need three more instructions, for denormal results."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series where the exponentials would cancel."""
    size = tl.abs(x)
    decayed = exponential(-2.0 * size)
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    found = tl.where(size < 0.3, size * series, (1.0 - decayed) / (1.0 + decayed))
    return tl.where(x < 0, -found, found)


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """Scores bent to between -SOFTCAP and SOFTCAP; unchanged if SOFTCAP is 0."""
    if SOFTCAP > 0:
        scores = SOFTCAP * tanh(scores * (1 / SOFTCAP))
    return scores


@triton.jit
def biased(scores, bias, strides, sample, head, row, key, seen, BIAS: tl.constexpr):
    """Scores plus the bias of the chosen rows, and which keys stay seen. A bias <= ``BIAS`` hides a key."""
    if BIAS < 0:
        places = bias + sample * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]
        extra = tl.load(places + key.to(tl.int64) * strides[3], mask=seen, other=0.0).to(tl.float32)
        # NaN hides nothing.
        seen &= (extra > BIAS) | (extra != extra)
        scores += extra
    return scores, seen


@triton.jit
def seen_span(first, last, begin, end, keys, FOLD: tl.constexpr):
    """The keys of a cut that at least one of the rows sees."""
    if FOLD == 1:
        begin = tl.maximum(begin, tl.min(tl.where(last > first, first, keys), 0))
        end = tl.minimum(end, tl.max(last, 0))
    return begin, end


@triton.jit(do_not_specialize=VARYING)
def row_lse(
    query,
    key,
    rows,
    ranges,
    key_mask,
    bias,
    sums,
    q_strides,
    k_strides,
    b_strides,
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
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Largest scores and sums of exponentials over one cut of the keys, (2, splits, B, Hk, R * GROUPS)."""
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
        scores = capped(exact_dot(q, tl.trans(k)) * scale, SOFTCAP)
        allowed = seen[None, :] & (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
        scores, allowed = biased(
            scores, bias, b_strides, sample, own_head[:, None], r[:, None], n[None, :], allowed, BIAS
        )
        scores = tl.where(allowed, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * exponential(top - safe) + tl.sum(exponential(scores - safe[:, None]), 1)
        top = higher
    rank = (split * tl.num_programs(2) + sample) * tl.num_programs(1) + head
    at = sums + rank * count * GROUPS + m
    plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * count * GROUPS * splits
    tl.store(at, top, mask=inside)
    tl.store(at + plane, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def combine_rows(
    sums,
    sinks,
    lse_out,
    rest_out,
    scales,
    count,
    splits,
    GROUPS: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The logsumexp of every row and the scale of its entries, from the cuts of ``row_lse`` in order."""
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < count * GROUPS
    stacked = (sample * tl.num_programs(1) + head) * count * GROUPS + m
    step = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * count * GROUPS
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(sums + stacked + split * step, mask=inside, other=-float("inf")))
    if SINKS:
        sunk = tl.load(sinks + head * GROUPS + m % GROUPS).to(tl.float32)
        top = tl.maximum(top, sunk, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        total += exponential(sunk - top)
    for split in range(splits):
        place = sums + stacked + split * step
        part = tl.load(place + splits * step, mask=inside, other=0.0)
        total += part * exponential(tl.load(place, mask=inside, other=-float("inf")) - top)
    # A non-finite row has the sum NaN, and is NaN at every column.
    some = total != 0
    total = tl.where(some, total, 1.0)
    lse = top + tl.log(total)
    # Rounding error of the logsumexp: it grows with the scores.
    rest = (top - lse) + tl.log(total)
    of_row = ((sample * tl.num_programs(1) + head) * GROUPS + m % GROUPS) * count + m // GROUPS
    tl.store(lse_out + of_row, tl.where(some, lse, -float("inf")), mask=inside)
    tl.store(rest_out + of_row, rest, mask=inside)
    tl.store(scales + of_row, top, mask=inside)
    tl.store(scales + step + of_row, 1.0 / total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def row_columns(
    query,
    key,
    rows,
    ranges,
    key_mask,
    bias,
    columns,
    scales,
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
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    MEAN: tl.constexpr,
    INDEX: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Chosen columns of the chosen rows: of one query head, or summed over those of one key head."""
    lists = tl.num_programs(1) // (1 if MEAN else GROUPS)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    # The first query head of the program, and of the sample where the heads are summed.
    first_head = head * GROUPS if MEAN else head
    kv = first_head // GROUPS
    r = tl.program_id(0) % tl.cdiv(count, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < count
    row, valid, first, last = row_bounds(rows, ranges, sample, r, count, queries, own, CAUSAL, RANGE)
    c = tl.program_id(0) // tl.cdiv(count, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    chosen = c < width
    if INDEX:
        column = tl.load(columns + sample * width + c, mask=chosen, other=-1)
        chosen = (column >= 0) & (column < own)
        column = tl.where(chosen, column, 0).to(tl.int32)
    else:
        column = tl.where(chosen, start + c, 0)
    allowed = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
    plane = tl.num_programs(2).to(tl.int64) * lists * GROUPS * count
    mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(FOLD):
        n = column + part * own
        _, seen = seen_keys(key_mask, sample, n, keys, own, MASK, 1)
        seen &= chosen
        of_keys = token_at(key, k_strides, sample, kv, n.to(tl.int64))
        k = tl.trans(vectors(of_keys, seen, k_strides[3], 0, WIDTH, BLOCK_D))
        shown = allowed & seen[None, :]
        groups: tl.constexpr = GROUPS if MEAN else 1
        for group in range(groups):
            of_rows = token_at(query, q_strides, sample, first_head + group, row)
            q = vectors(of_rows, valid, q_strides[3], 0, WIDTH, BLOCK_D)
            rank = (sample * lists * GROUPS + first_head + group) * count + r
            top = tl.load(scales + rank, mask=inside, other=0.0)
            share = tl.load(scales + plane + rank, mask=inside, other=0.0)
            scores, shared = biased(
                *(capped(exact_dot(q, k) * scale, SOFTCAP), bias, b_strides, sample, first_head + group),
                *(r[:, None], n[None, :], shown, BIAS),
            )
            mass += tl.where(shared, exponential(scores - top[:, None]), 0.0) * share[:, None]
    block = head * tl.num_programs(2) + sample if MEAN else sample * tl.num_programs(1) + head
    at = partial + (block * count + r[:, None]) * width + c[None, :]
    tl.store(at, tl.where(chosen[None, :], mass * SCALE, 0.0), mask=inside[:, None] & (c < width)[None, :])


@triton.jit(do_not_specialize=VARYING)
def mean_heads(partial, out, size, kv_heads, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean over the heads, from (Hk, size) sums over the query heads of each key head."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(kv_heads):
        total += tl.load(partial + tl.cast(head, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total / (kv_heads * GROUPS), mask=place < size)
