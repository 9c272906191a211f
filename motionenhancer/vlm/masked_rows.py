"""Attention at chosen rows and columns under any mask, for the masks that no causal flag can describe."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["masked_attention_rows"]


def masked_attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | slice,
    mask: torch.Tensor,
    *,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Read softmax attention at chosen rows and columns, each row under its own mask, mean over heads.

    The largest temporary is one key-value head's (B, Hq/Hkv, R, N); nothing of that size is kept for
    backward.

    Parameters
    ----------
    query: (B, Hq, N, D), any float type.
    key: (B, Hkv, N, D); Hkv divides Hq.
    rows: (B, R) int64 positions in N; a negative one gives a row of zeros.
    columns: (B, C) int64 positions in N, a negative one gives a column of zeros; or a slice of step 1.
    mask: (B, 1 or Hq, R, N); True or a finite number where row r may see key n. Numbers are added to the
        scores.
    softmax_scale: D ** -0.5 by default.

    Returns
    -------
    (B, R, C) float32, float64 for float64 inputs; differentiable once in query and key. A row that may see no
    key is zero.

    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    >>> float(masked_attention_rows(q, k, torch.tensor([[2]]), slice(0, 6), mask).sum())  # doctest: +ELLIPSIS
    1.0...
    """
    if isinstance(columns, slice):
        span = torch.arange(key.shape[2], device=key.device)[columns]
        columns = span.expand(query.shape[0], -1)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    read = _MaskedRows.apply(query.gather(2, index), key, columns.clamp(min=0), _bias(mask, rows), scale)
    return read.masked_fill((columns < 0)[:, None], 0.0)


def _bias(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed & (rows >= 0)[:, None, :, None]
    if mask.dtype == torch.bool:
        return allowed
    return torch.where(allowed, mask, float("-inf"))


def _probabilities(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of (B, G, R, D) against (B, N, D) under (B, 1 or G, R, N), in the dtype of the inputs."""
    scores = torch.einsum("bgrd,bnd->bgrn", query, key) * scale
    if bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    else:
        scores = scores + bias
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _of_head(bias: torch.Tensor, group: slice) -> torch.Tensor:
    return bias if bias.shape[1] == 1 else bias[:, group]


class _MaskedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        columns: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, columns, bias)
        ctx.scale = scale
        heads, groups = query.shape[1], key.shape[1]
        width = heads // groups
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        index = columns[:, None, None, :].expand(-1, width, query.shape[2], -1)
        out = query.new_zeros(query.shape[0], query.shape[2], columns.shape[1], dtype=dtype)
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            p = _probabilities(query[:, part].to(dtype), key[:, g].to(dtype), _of_head(bias, part), scale)
            out += p.gather(3, index).sum(dim=1)
        return out / heads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, columns, bias = ctx.saved_tensors
        (grad,) = grads
        heads, groups = query.shape[1], key.shape[1]
        width = heads // groups
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
        dense = grad.new_zeros(*grad.shape[:2], key.shape[2], dtype=dtype)
        dense.scatter_add_(2, columns[:, None, :].expand_as(grad), grad.to(dtype) / heads)
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            q, k = query[:, part].to(dtype), key[:, g].to(dtype)
            p = _probabilities(q, k, _of_head(bias, part), ctx.scale)
            direct = p * dense[:, None]
            scores = (direct - p * direct.sum(dim=-1, keepdim=True)) * ctx.scale
            grad_query[:, part] = torch.einsum("bgrn,bnd->bgrd", scores, k).to(query.dtype)
            grad_key[:, g] = torch.einsum("bgrn,bgrd->bnd", scores, q).to(key.dtype)
        return grad_query, grad_key, None, None, None
