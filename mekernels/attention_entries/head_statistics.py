"""Statistics that tell kinds of heads apart: entropy, distance and share of sinks, without the map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, launch, reference
from . import composite
from .call import Call
from .op import LIMITS, attention_columns_op, checked, columns_of, window_of


class HeadStatistics(NamedTuple):
    """Means over the rows of every head, each (B, Hq); what :func:`head_statistics` returns.

    Example:
        >>> import torch, mekernels
        >>> query = torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, query, query)
        >>> mekernels.head_statistics(query, query, lse).entropy.shape
        torch.Size([1, 2])
    """

    entropy: Tensor
    """Entropy of a row's attention in nats: 0 if the row looks at one key, log(n) if evenly at n keys."""
    distance: Tensor
    """Number of tokens between a row and its keys, weighted by attention."""
    sink: Tensor
    """Share of a row's attention on the sinks."""


def head_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    sinks: Tensor | slice = slice(0, 1),
    rows: slice | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> HeadStatistics:
    """Entropy, mean distance and share of attention sinks of every head, in one pass over the scores.

    Args:
        query, key, lse, softmax_scale, causal, key_mask, window, softcap: as in
            :func:`mekernels.attention_columns`.
        sinks: keys that count as sinks, (B, C) int64 positions, -1 is padding, or a slice; the first key by
            default.
        rows: the window of rows to average, a slice of step 1; all by default.
        bias: (B or 1, Hq or 1, R or 1, Nk or 1) for the window of rows; otherwise as in
            :func:`mekernels.attention_columns`.

    Returns:
        Entropy, distance and sink share, each (B, Hq), float64 for float64 input and float32 otherwise. Rows
        that see no key are left out; if no row sees a key, all three are 0. The position of row i is
        i + Nk - Nq, as with ``causal``. Learned sinks are not keys: none of the three counts them.
        Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the backend of :func:`mekernels.use_backend` cannot run the call.

    Source: entropy and distance of heads as in "Analyzing the Structure of Attention" (Vig and Belinkov,
    2019, arXiv 1906.04284); sinks as in "Efficient Streaming Language Models with Attention Sinks" (Xiao et
    al., ICLR 2024, arXiv 2309.17453).

    Example:
        >>> import torch, mekernels
        >>> query, key = torch.zeros(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
        >>> _, lse = mekernels.flash_attention(query, key, key)
        >>> found = mekernels.head_statistics(query, key, lse)  # every row looks evenly at ten keys
        >>> found.entropy.exp().round().tolist(), round(float(found.sink[0, 0]), 3)
        ([[10.0, 10.0]], 0.1)
    """
    limits = softmax_scale, causal, window, softcap
    query, key, options = checked("head_statistics", query, key, key_mask, *limits)
    checks.logsumexp(lse, query)
    chosen = checks.window("rows", rows, query.shape[2])
    size = chosen.stop - chosen.start, key.shape[2]
    checks.bias(bias, query, size, meaning="(batch, heads, rows, keys), or 1 of any")
    index, *between = checks.columns(sinks, query, key.shape[2])
    if index is not None:
        checks.index_values("sinks", index, key.shape[2])
    with torch.no_grad():
        if backends.active() == "reference":
            named = dict(zip(LIMITS, limits, strict=True)) | {"key_mask": key_mask, "bias": bias}
            found = backends.by_reference(
                reference.head_statistics, query, key, lse, sinks=sinks, rows=chosen, **named
            )
            return HeadStatistics(*(item.to(lse.dtype) for item in found))
        part = window_of(query, key, lse, chosen, slice(0, key.shape[2]), options, key_mask, bias)
        on_sinks = attention_columns_op(columns_of(part, index, *between), False)
        each = *attention_row_statistics_op(part), on_sinks.sum(-1)
        seeing = part.lse != -torch.inf
        count = seeing.sum(-1).clamp(min=1)
        return HeadStatistics(*(torch.where(seeing, item, 0).sum(-1) / count for item in each))


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    entropy = call.lse.new_empty(call.lse.shape)
    return entropy, torch.empty_like(entropy)


attention_row_statistics_op = backends.Op("attention_row_statistics", _fake)
"""Entropy of every row's attention and mean distance to the keys that it sees, each (B, Hq, R)."""


def _triton(call: Call) -> tuple[Tensor, Tensor]:
    from . import plan

    return plan.row_statistics(call)


def _triton_reasons(call: Call) -> list[str]:
    return launch.reasons(call.query)


op = "attention_row_statistics"
backends.register(op, "triton", _triton, reasons=_triton_reasons, machine=launch.machine)
backends.register(op, "torch", composite.row_statistics)
