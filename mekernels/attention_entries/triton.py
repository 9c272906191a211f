"""Triton kernels that read entries of an attention map from query, key and the rows' logsumexp.

For sums and gradients, a program holds a block of the outer axis and loops over the inner axis. ``KEYS``,
known at compile time, says that the keys are the outer axis; otherwise the rows are. One program writes each
element of a result, so results do not change from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_rows.triton import biased, capped, exact_dot, exponential, tanh, token_at, vectors
from ..attention_rows.triton_backward import scaled_dot

VARYING = [
    *("rows", "keys", "heads", "start", "shift", "lower", "upper", "first", "stop", "period", "band"),
    *("lse", "places", "bias", "ranges", "grad"),
]
"""Numbers that vary from call to call, and tensors that may begin anywhere."""

PER_KEY, PER_ROW = tl.constexpr(1), tl.constexpr(2)
"""Values of ``GIVEN``: the gradients are the same for all rows, or for all keys; 0 where neither holds."""


@triton.jit
def key_places(places, sample, c, keys, start, LISTED: tl.constexpr):
    """Positions of the keys ``c``, -1 for a key that no row sees."""
    if LISTED:
        return tl.load(places + sample * keys + c, mask=c < keys, other=-1).to(tl.int32)
    return tl.where(c < keys, start + c, -1)


@triton.jit
def row_range(ranges, sample, row, rows):
    """First key and end of the rows that are there."""
    at = ranges + (sample * rows + row) * 2
    return tl.load(at, mask=row < rows, other=0), tl.load(at + 1, mask=row < rows, other=0)


@triton.jit
def seen_keys(
    place,
    row,
    rows,
    ranges,
    sample,
    lower,
    upper,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Whether rows see keys, from row + lower to row + upper; one is (n, 1), the other (1, n)."""
    seen = (place >= 0) & (row < rows)
    if RANGE:
        first, last = row_range(ranges, sample, row, rows)
        seen &= (place >= first) & (place < last)
    if UPPER:
        seen &= place <= row + upper
    if LOWER:
        seen &= place >= row + lower
    return seen


@triton.jit
def products(
    at_outer,
    outer,
    outer_known,
    outer_stride,
    at_inner,
    inner_known,
    inner_stride,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_O, BLOCK_I) products. ``outer``: vectors of the outer axis, if one chunk holds them whole."""
    if CHUNK == BLOCK_D:
        return exact_dot(outer, tl.trans(vectors(at_inner, inner_known, inner_stride, 0, WIDTH, BLOCK_D)))
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for begin in range(0, WIDTH, CHUNK):
        one = vectors(at_outer, outer_known, outer_stride, begin, WIDTH, CHUNK)
        other = vectors(at_inner, inner_known, inner_stride, begin, WIDTH, CHUNK)
        total = tl.dot(one, tl.trans(other), total, input_precision="ieee")
    return total


@triton.jit
def inner_span(
    outer,
    place,
    rows,
    keys,
    start,
    ranges,
    sample,
    lower,
    upper,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The part of the inner axis that an outer block must read."""
    begin = 0
    end = keys
    if KEYS:
        end = rows
        if UPPER:
            begin = tl.maximum(tl.min(tl.where(place >= 0, place - upper, rows), 0), 0)
        if LOWER:
            end = tl.minimum(rows, tl.max(tl.where(place >= 0, place - lower + 1, 0), 0))
    elif not LISTED:
        if UPPER:
            end = tl.minimum(keys, tl.max(outer, 0) + upper - start + 1)
        if LOWER:
            begin = tl.maximum(tl.min(outer, 0) + lower - start, 0)
        if RANGE:
            first, last = row_range(ranges, sample, outer, rows)
            begin = tl.maximum(begin, tl.min(tl.where(first < last, first, start + keys), 0) - start)
            end = tl.minimum(end, tl.max(last, 0) - start)
    return begin, end


@triton.jit(do_not_specialize=VARYING)
def column_entries(
    query,
    key,
    lse,
    places,
    bias,
    ranges,
    out,
    q_strides,
    k_strides,
    b_strides,
    rows,
    keys,
    heads,
    start,
    lower,
    upper,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of the entries of one head, or of the mean over all heads, (B, 1 or Hq, R, C)."""
    sample = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(rows, BLOCK_O)
    row = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.program_id(0) // blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    place = key_places(places, sample, c, keys, start, LISTED)
    seen = seen_keys(
        *(place[None, :], row[:, None], rows, ranges, sample, lower, upper),
        *(LOWER, UPPER, RANGE),
    )
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for one in range(heads if MEAN else 1):
        head = tl.cast(one if MEAN else tl.program_id(1), tl.int64)
        at_query = token_at(query, q_strides, sample, head, row.to(tl.int64))
        at_key = token_at(key, k_strides, sample, head // GROUPS, c.to(tl.int64))
        q = vectors(at_query, row < rows, q_strides[3], 0, WIDTH, CHUNK)
        scores = products(
            *(at_query, q, row < rows, q_strides[3], at_key, place >= 0, k_strides[3]),
            *(WIDTH, CHUNK, BLOCK_O, BLOCK_I, BLOCK_D),
        )
        sums = tl.load(lse + (sample * heads + head) * rows + row, mask=row < rows, other=0.0)
        scores, shown = biased(
            *(capped(scores * scale, SOFTCAP), bias, b_strides, sample, head),
            *(row[:, None], c[None, :], seen, BIAS),
        )
        total += tl.where(shown, exponential(scores - sums[:, None]), 0.0)
    if MEAN:
        total = total / heads
    rank = sample * tl.num_programs(1) + tl.program_id(1)
    at = out + (rank * rows + row[:, None]) * keys + c[None, :]
    tl.store(at, total, mask=(row < rows)[:, None] & (c < keys)[None, :])


@triton.jit
def outer_block(
    query,
    key,
    of_lse,
    places,
    q_strides,
    k_strides,
    sample,
    head,
    o,
    rows,
    keys,
    start,
    GROUPS: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """For tokens ``o`` of the outer axis: addresses, positions, which are valid, and logsumexp of rows."""
    if KEYS:
        place = key_places(places, sample, o, keys, start, LISTED)
        at = token_at(key, k_strides, sample, head // GROUPS, o.to(tl.int64))
        return at, place, place >= 0, tl.zeros_like(place).to(tl.float32)
    at = token_at(query, q_strides, sample, head, o.to(tl.int64))
    return at, o, o < rows, tl.load(of_lse + o, mask=o < rows, other=0.0)


@triton.jit
def inner_block(
    query,
    key,
    of_lse,
    places,
    bias,
    ranges,
    q_strides,
    k_strides,
    b_strides,
    sample,
    head,
    o,
    i,
    at_outer,
    outer,
    place,
    known,
    sums,
    rows,
    keys,
    start,
    lower,
    upper,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For tokens ``i`` of the inner axis: (BLOCK_O, BLOCK_I) entries, scores before the soft cap, and which
    are seen; addresses of the tokens, and which are valid."""
    if KEYS:
        at = token_at(query, q_strides, sample, head, i.to(tl.int64))
        inner_known = i < rows
        sums = tl.load(of_lse + i, mask=inner_known, other=0.0)[None, :]
        seen = seen_keys(
            *(place[:, None], i[None, :], rows, ranges, sample, lower, upper),
            *(LOWER, UPPER, RANGE),
        )
    else:
        at = token_at(key, k_strides, sample, head // GROUPS, i.to(tl.int64))
        inner_place = key_places(places, sample, i, keys, start, LISTED)
        inner_known = inner_place >= 0
        sums = sums[:, None]
        seen = seen_keys(
            *(inner_place[None, :], place[:, None], rows, ranges, sample, lower, upper),
            *(LOWER, UPPER, RANGE),
        )
    raw = products(
        *(at_outer, outer, known, k_strides[3] if KEYS else q_strides[3]),
        *(at, inner_known, q_strides[3] if KEYS else k_strides[3]),
        *(WIDTH, CHUNK, BLOCK_O, BLOCK_I, BLOCK_D),
    )
    raw = raw * scale
    row = i[None, :] if KEYS else o[:, None]
    c = o[:, None] if KEYS else i[None, :]
    scores, seen = biased(capped(raw, SOFTCAP), bias, b_strides, sample, head, row, c, seen, BIAS)
    return tl.where(seen, exponential(scores - sums), 0.0), raw, seen, at, inner_known


@triton.jit(do_not_specialize=VARYING)
def entry_sums(
    query,
    key,
    lse,
    places,
    bias,
    ranges,
    out,
    q_strides,
    k_strides,
    b_strides,
    rows,
    keys,
    start,
    lower,
    upper,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    LARGEST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the entries over the inner axis, or their maximum (at least 0), (B, Hq, outer axis)."""
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    rank = sample * tl.num_programs(1) + head
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    of_lse = lse + rank * rows
    at, place, known, sums = outer_block(
        *(query, key, of_lse, places, q_strides, k_strides, sample, head, o, rows, keys, start),
        *(GROUPS, LISTED, KEYS),
    )
    outer = vectors(at, known, k_strides[3] if KEYS else q_strides[3], 0, WIDTH, CHUNK)
    begin, end = inner_span(
        *(o, place, rows, keys, start, ranges, sample, lower, upper, LOWER, UPPER, RANGE, LISTED, KEYS)
    )
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for first in range(begin, end, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        weights, _, _, _, _ = inner_block(
            *(query, key, of_lse, places, bias, ranges, q_strides, k_strides, b_strides, sample, head, o, i),
            *(at, outer, place, known, sums, rows, keys, start, lower, upper, scale, GROUPS, WIDTH),
            *(LOWER, UPPER, RANGE, SOFTCAP, BIAS, LISTED, KEYS, CHUNK, BLOCK_O, BLOCK_I, BLOCK_D),
        )
        if LARGEST:
            total = tl.maximum(total, weights, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += weights
    if LARGEST:
        # The largest of a block leaves out NaN.
        lost = tl.max((total != total).to(tl.int32), 1) > 0
        found = tl.where(lost, float("nan"), tl.max(total, 1))
    else:
        found = tl.sum(total, 1)
    length = keys if KEYS else rows
    tl.store(out + rank * length + o, found, mask=o < length)


@triton.jit
def given_tile(at, strides, row, c, rows, keys, seen, GIVEN: tl.constexpr):
    """Gradients of entries; rows and keys ``c`` are (n, 1) and (1, n), or the other way round."""
    if GIVEN == PER_KEY:
        given = tl.load(at + c * strides[3], mask=c < keys, other=0.0)
    elif GIVEN == PER_ROW:
        given = tl.load(at + row * strides[2], mask=row < rows, other=0.0)
    else:
        given = tl.load(at + row * strides[2] + c * strides[3], mask=seen, other=0.0)
    return given


@triton.jit(do_not_specialize=VARYING)
def entry_gradient(
    query,
    key,
    lse,
    places,
    bias,
    ranges,
    grad,
    out,
    lse_out,
    q_strides,
    k_strides,
    b_strides,
    g_strides,
    rows,
    keys,
    start,
    lower,
    upper,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    KEYS: tl.constexpr,
    GIVEN: tl.constexpr,
    SCALED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of keys, (B, Hk, C, D), or of queries, (B, Hq, R, D), and of their logsumexp."""
    sample = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    length = keys if KEYS else rows
    members: tl.constexpr = GROUPS if KEYS else 1
    first_head = tl.program_id(1).to(tl.int64) * members
    heads = tl.num_programs(1) * members
    of_lse = lse + (sample * heads + first_head) * rows
    at, place, known, sums = outer_block(
        *(query, key, of_lse, places, q_strides, k_strides, sample, first_head, o, rows, keys, start),
        *(GROUPS, LISTED, KEYS),
    )
    outer = vectors(at, known, k_strides[3] if KEYS else q_strides[3], 0, WIDTH, CHUNK)
    begin, end = inner_span(
        *(o, place, rows, keys, start, ranges, sample, lower, upper, LOWER, UPPER, RANGE, LISTED, KEYS)
    )
    total = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_O], tl.float32)
    for member in range(members):
        head = first_head + member
        of_grad = grad + sample * g_strides[0] + head * g_strides[1]
        for first in range(begin, end, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)
            weights, scores, seen, at_inner, inner_known = inner_block(
                *(query, key, of_lse + member * rows, places, bias, ranges, q_strides, k_strides, b_strides),
                *(sample, head, o, i, at, outer, place, known, sums, rows, keys, start, lower, upper, scale),
                *(GROUPS, WIDTH, LOWER, UPPER, RANGE, SOFTCAP, BIAS, LISTED, KEYS, CHUNK, BLOCK_O, BLOCK_I),
                *(BLOCK_D,),
            )
            row = i[None, :] if KEYS else o[:, None]
            c = o[:, None] if KEYS else i[None, :]
            given = given_tile(of_grad, g_strides, row.to(tl.int64), c.to(tl.int64), rows, keys, seen, GIVEN)
            change = tl.where(seen, weights * given, 0.0)
            inner = vectors(at_inner, inner_known, q_strides[3] if KEYS else k_strides[3], 0, WIDTH, BLOCK_D)
            if SOFTCAP > 0:
                bent = tanh(scores * (1 / SOFTCAP))
                total += scaled_dot(change * (1.0 - bent * bent), inner, SCALED)
            else:
                total += scaled_dot(change, inner, SCALED)
            if not KEYS:
                slope += tl.sum(change, 1)
    rank = sample * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    to = out + (rank * length + o[:, None]) * WIDTH + d[None, :]
    inside = o < length
    tl.store(to, (total * scale).to(out.dtype.element_ty), mask=inside[:, None] & (d < WIDTH)[None, :])
    if not KEYS:
        tl.store(lse_out + rank * rows + o, -slope, mask=inside)
