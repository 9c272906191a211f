"""The Triton kernel for the gradient of a bias of ``attention_rows``; see ``triton_backward.py``.

The gradient of a bias is that of the scores after the soft cap. One program writes each tile: it adds the
gradients of all entries that share the tile's part of the bias, in a fixed order, and stores none of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton import VARYING, seen_keys, token_at, vectors
from .triton_backward import PADDED, gathered, score_gradient, visible


@triton.jit(do_not_specialize=[*VARYING, "samples"])
def bias_gradient(
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
    count,
    keys,
    own,
    start,
    stop,
    samples,
    kv_heads,
    scale,
    grad_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    FOLD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    OF_SAMPLE: tl.constexpr,
    OF_HEAD: tl.constexpr,
    OF_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of one tile of the bias, float32 (B or 1, Hq or 1, R or 1, Nk).

    ``OF_SAMPLE``, ``OF_HEAD`` and ``OF_ROW``: whether each sample, head and row has values of its own.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    heads = 1 if OF_HEAD else kv_heads * GROUPS
    blocks = 1 if OF_ROW else tl.cdiv(count, BLOCK_M)
    shared = heads * blocks * (1 if OF_SAMPLE else samples)
    lane = tl.arange(0, CHUNK)
    padded = tl.cdiv(count * GROUPS, PADDED) * PADDED
    plane = samples.to(tl.int64) * kv_heads * padded
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(shared):
        sample = tl.program_id(2).to(tl.int64) + step // (heads * blocks)
        head = tl.program_id(1) + step // blocks % heads
        r = (tl.program_id(0) // tiles + step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        base = (sample * kv_heads + head // GROUPS) * padded
        m = tl.minimum(r, count - 1) * GROUPS + head % GROUPS
        lse, rest, slope, first, last, place = gathered(
            measures + base, bounds + base, places + base, m, plane, RANGE
        )
        position, seen = seen_keys(key_mask, sample, n, keys, own, MASK, FOLD)
        read = seen & (position >= start) & (position < stop)
        given = tl.load(grad + place[:, None] + (position - start)[None, :], mask=read[None, :], other=0.0)
        at = token_at(key, k_strides, sample, (head // GROUPS).to(tl.int64), n.to(tl.int64))
        of_queries = packed + (base + m) * BLOCK_D
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, WIDTH, CHUNK):
            q = tl.load(of_queries[:, None] + (begin + lane)[None, :])
            k = vectors(at, seen, k_strides[3], begin, WIDTH, CHUNK)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        position = tl.where(seen, position, 2147483647)
        change = score_gradient(
            *(scores, bias, b_strides, sample, head, r[:, None], n[None, :], lse[:, None], rest[:, None]),
            *(given, slope[:, None], visible(position[None, :], first[:, None], last[:, None], RANGE)),
            *(scale, grad_scale, SOFTCAP, BIAS, True),
        )
        total += tl.where((r < count)[:, None], change, 0.0)
    of_list = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if OF_ROW:
        r = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        at = out + (of_list * count + r)[:, None] * keys + n[None, :]
        tl.store(at, total, mask=(r < count)[:, None] & (n < keys)[None, :])
    else:
        tl.store(out + of_list * keys + n, tl.sum(total, 0), mask=n < keys)
