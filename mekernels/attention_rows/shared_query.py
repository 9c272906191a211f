"""One gradient for a query that both the model's attention and ``attention_rows`` read.

A dense gradient of the query costs as much memory traffic as the gradient of the model's attention, although
it is zero outside the chosen rows. Here only the gradient of the rows is added to the attention's gradient.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .composite import _add_rows, _picked
from .reading import row_limits


def share_query(query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split the use of a query between the model's attention and :func:`mekernels.attention_rows`.

    Args:
        query: (B, Hq, Nq, D), floating point.
        rows: (B, R) int64 query positions; -1 is padding.

    Returns:
        The query for the model's attention, to use in place of the argument, and its (B, Hq, R, D) rows.
        Once both have a gradient, the gradient of the rows is added in place to the gradient of the query,
        which is copied first only if something else holds it. On a GPU, equal rows are added in no fixed
        order.

    Example:
        >>> import torch, mekernels
        >>> query = torch.randn(1, 4, 6, 8, requires_grad=True)
        >>> key, rows = torch.randn(1, 2, 6, 8), torch.tensor([[5, 2]])
        >>> shared, picked = share_query(query, rows)
        >>> places, limits = picked_rows(rows, 6, 6, causal=True)
        >>> read = mekernels.attention_rows(picked, key, places, slice(0, 3), key_range=limits)
        >>> whole = mekernels.attention_rows(query, key, rows, slice(0, 3), causal=True)
        >>> torch.allclose(read, whole)
        True
    """
    # Counted in the forward: a backward must not begin another backward.
    if _COUNTS and not torch.compiler.is_compiling():
        _alone(False), _alone(True)
    shared, picked = _Shared.apply(query, rows.clamp(0, query.shape[2] - 1))
    return shared, picked


def picked_rows(
    rows: Tensor, queries: int, keys: int, *, causal: bool = False, key_range: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Arguments of :func:`mekernels.attention_rows` that replace a query by some of its rows.

    All layers of a model share them.

    Args:
        rows: (B, R) int64 query positions; -1 is padding.
        queries: number of all queries.
        keys: number of keys of one part.
        causal, key_range: as in :func:`mekernels.attention_rows`.

    Returns:
        (B, R) indices of the rows among the picked rows, -1 for padding, and (B, R, 2) ``key_range``, None if
        every row may see every key. The call itself must not be ``causal``.
    """
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    places = torch.where((rows >= 0) & (rows < queries), places, -1)
    return places, row_limits(rows, queries, keys, causal, key_range)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.shape = query.shape
        ctx.set_materialize_grads(False)
        return query.view_as(query), _picked(query, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        whole, picked = grads
        del grads
        if picked is None:
            return whole, None
        if whole is None:
            whole = picked.new_zeros(ctx.shape)
        elif not _only_here(whole):
            whole = whole.clone()
        _add_rows(whole[None], picked[None], rows)
        return whole, None


_COUNTS = hasattr(torch.Tensor, "_use_count")
"""Whether this torch can count the holders of a tensor. If it cannot, gradients are copied."""


def _only_here(grad: Tensor) -> bool:
    """Whether no other gradient, hook or variable holds the memory of a gradient."""
    if not _COUNTS or torch.compiler.is_compiling() or torch._debug_has_internal_overlap(grad):
        return False
    return _holders(grad) == _alone(grad._base is not None)


def _holders(grad: Tensor) -> list[int]:
    """Numbers of holders of a tensor, of the tensor it is a view of, and of its memory."""
    counts = [torch._C._storage_Use_Count(grad.untyped_storage()._cdata)]
    for item in (grad, grad._base):
        if item is not None:
            counts += [sys.getrefcount(item), item._use_count()]  # type: ignore[attr-defined]
    return counts


@functools.cache
def _alone(view: bool) -> list[int]:
    """The counts of a gradient that nothing else holds, and of a view of such a gradient."""
    counts: list[list[int]] = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
            return query.view_as(query), picked.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
            whole, _ = grads
            del grads
            count(whole)
            return None, None

    def count(grad: Tensor) -> None:
        # Called as deep as _only_here is: each call on the way holds a reference to the gradient.
        counts.append(_holders(grad))

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        start = torch.ones(2, 2, requires_grad=True) * 1.0
        shared, picked = Counting.apply(start, start[0])
        result = (shared.mT if view else shared) * 2.0
        (result.square().sum() + picked.sum()).backward()
    return counts[0]
