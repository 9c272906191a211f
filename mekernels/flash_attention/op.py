"""Attention and the row logsumexp, from the fastest installed flash backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import backends, checks, reference
from ..attention_entries import differentiable_lse
from . import composite, kernels, packages
from .call import Call


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logsumexp of every row.

    Args:
        query: (B, Hq, Nq, D), floating point, any strides.
        key: (B, Hk, Nk, D); Hk divides Hq (grouped-query heads: query head h reads key head h * Hk // Hq).
        value: (B, Hk, Nk, Dv).
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal: row i sees key j when j <= i + Nk - Nq (ends aligned). A row that sees no key gives zeros.
        window: (left, right) limits row i to the keys from i + Nk - Nq - left to i + Nk - Nq + right, as in
            flash-attn; -1 for no limit.
        softcap: scores become softcap * tanh(score / softcap), before the mask.
        key_mask: (B, Nk) bool, True where a key may be seen; not with ``causal`` or ``window``. Each sample
            is computed by itself, without its hidden keys, so every backend can do it. The call waits for
            the device.
        backend: ``"auto"``, ``"torch"`` (chunked composite) or ``"reference"``; a kernel of torch:
            ``"cpu_flash"``, ``"flash"``, ``"cudnn"``, ``"efficient"``, ``"varlen_attn"``,
            ``"flex_attention"`` (only on request: it compiles for each kind of call); or an installed
            package: ``"flash_attn_3"``, ``"flash_attn_4"``, ``"flash_attn"``, ``"xformers"``. ``"auto"``
            follows :func:`mekernels.use_backend`. ``python -m mekernels`` prints what each of them can do.

    Returns:
        out and lse. out is (B, Hq, Nq, Dv) in the dtype of ``query``, differentiable in query, key and value.
        lse is (B, Hq, Nq), natural logarithm, float64 for float64 input and float32 otherwise, -inf for a row
        that sees no key, differentiable in query and key. A gradient of lse costs one more attention, with
        the keys as values. ``"flash_attn_4"`` and ``"flex_attention"`` compute it themselves.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: an explicit backend cannot run the call; the message lists the reasons.

    Source: the logsumexp every flash attention keeps for its backward (Dao et al., FlashAttention, 2022).

    Example:
        >>> import torch, mekernels
        >>> query, key, value = torch.randn(3, 1, 2, 10, 16)
        >>> out, lse = mekernels.flash_attention(query, key, value)
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 10, 16]), torch.Size([1, 2, 10]))
    """
    checks.query_key(query, key)
    checks.tensor("value", value, 4, layout="(batch, heads, tokens, width)")
    checks.same_dtype("value", value, "query", query)
    checks.same_device("value", value, "query", query)
    checks.shape(
        "value",
        value,
        (*key.shape[:3], value.shape[3]),
        meaning="(as key, any width)",
    )
    checks.boolean("causal", causal)
    checks.choice("backend", backend, ("auto", "reference", *backends.table("flash_attention")))
    checks.window_size(window)
    scale, cap = checks.scale(softmax_scale, query.shape[3]), checks.softcap(softcap)
    left, right = window or (-1, -1)
    checks.key_mask(key_mask, key)
    if key_mask is not None and (causal or window is not None):
        raise ValueError(f"key_mask cannot be combined with {'causal' if causal else 'window'}")
    if backend == "auto":
        backend = backends.active()
    if backend == "reference":
        out, lse = backends.by_reference(
            reference.flash_attention,
            *(query, key, value),
            **{"softmax_scale": scale, "causal": causal, "window": window, "softcap": softcap},
            key_mask=key_mask,
        )
        return out.to(query.dtype), lse.to(checks.accumulate_dtype(query.dtype))
    if key_mask is not None and len(key_mask):
        samples = [
            flash_attention(
                query[i : i + 1],
                key[i : i + 1, :, seen],
                value[i : i + 1, :, seen],
                softmax_scale=scale,
                softcap=softcap,
                backend=backend if seen.any() else "torch",
            )
            for i, seen in enumerate(key_mask)
        ]
        outs, sums = zip(*samples, strict=True)
        return torch.cat(outs), torch.cat(sums)
    checks.no_tangents("flash_attention", (query, key, value))
    call = Call(query, key, value, scale, causal or right == 0, left, right, cap)
    if backend == "auto" and kernels.prefers_cudnn(call):
        backend = "cudnn"
    run = backends.choose("flash_attention", backend, call)
    out, lse = backends.exactly(run, call)
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return out, lse.detach()
    if run not in packages.DIFFERENTIABLE:
        lse = differentiable_lse(query, key, lse.detach(), (scale, *call.window, cap))
    return out, lse


def _package(name: str) -> Callable[[], list[str]]:
    return lambda: list(packages.missing(name))


_flash_attn, _varlen, _xformers = (
    partial(kernels.package_reasons, name) for name in ("flash_attn", "varlen_attn", "xformers")
)
for name, run, reasons, machine in (
    ("cpu_flash", kernels.cpu_flash, kernels.cpu_flash_reasons, list),
    ("flash_attn_3", packages.flash_attn_3, kernels.hopper_reasons, _package("flash_attn_3")),
    ("flash_attn_4", packages.flash_attn_4, kernels.newest_reasons, _package("flash_attn_4")),
    ("flash", kernels.flash, kernels.flash_reasons, kernels.no_cuda),
    ("cudnn", kernels.cudnn, kernels.cudnn_reasons, kernels.cudnn_machine),
    ("flash_attn", packages.flash_attn, _flash_attn, _package("flash_attn")),
    ("varlen_attn", packages.varlen_attn, _varlen, _package("varlen_attn")),
    ("xformers", packages.xformers, _xformers, _package("xformers")),
    ("efficient", kernels.efficient, kernels.efficient_reasons, kernels.no_cuda),
    ("torch", composite.forward, lambda call: [], list),
    # Behind the one that runs everything: auto does not reach it.
    ("flex_attention", packages.flex_attention, kernels.flex_reasons, _package("flex_attention")),
):
    backends.register("flash_attention", name, run, reasons=reasons, machine=machine)
