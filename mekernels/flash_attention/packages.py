"""Attention of the optional packages flash-attn (2 and 3) and xformers, behind one signature.

Both take (batch, tokens, heads, width) and return the natural-log logsumexp as (batch, heads, queries).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
from typing import Any

import torch
from torch import Tensor

from .call import Call, Result

PACKAGES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "xformers": "xformers.ops"}
"""Backend names and the modules that they need."""

_MEMBERS = {
    "flash_attn": ("flash_attn_func",),
    "flash_attn_3": ("flash_attn_func",),
    "xformers": ("fmha", "LowerTriangularMask"),
}
"""The functions that each adapter takes from its module."""


@torch.compiler.assume_constant_result
def missing(backend: str) -> tuple[str, ...]:
    """Why the package of a backend cannot be used on this machine; constant while the process runs."""
    return _missing(backend)


@functools.cache
def _missing(backend: str) -> tuple[str, ...]:
    name = PACKAGES[backend]
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return (f"the package {package} is not installed",)
    folders = getattr(spec, "submodule_search_locations", None)
    if folders and spec.origin is None:
        return (
            f"the package {package} is not installed: {next(iter(folders))} is a namespace package without "
            "code of its own (flash-attn 4 alone leaves such a flash_attn)",
        )
    if not torch.cuda.is_available():
        return ("no CUDA device",)
    module = _imported(name)
    if isinstance(module, Exception):
        return (f"importing {name} failed: {module}",)
    lacking = [member for member in _MEMBERS[backend] if not hasattr(module, member)]
    return tuple(f"{name} has no {member}: another package or release" for member in lacking)


@torch.compiler.assume_constant_result
def other_alignment(backend: str) -> tuple[str, ...]:
    """Why a backend's causal mask differs from ours if the numbers of queries and keys differ.

    flash-attn aligns the last query with the last key, as we do, since 2.1 (its README, "Changelog").
    """
    if backend == "flash_attn_3":
        return ()
    what = "causal attention with different numbers of queries and keys"
    if backend != "flash_attn":
        return (f"{what} aligns their starts, not their ends",)
    version = str(getattr(_imported(PACKAGES[backend]), "__version__", "unknown"))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (2, 1):
        return ()
    return (f"{what} needs flash-attn 2.1 or later, which aligns their ends; found {version}",)


def _imported(name: str) -> Any:
    """A module, or the error of its import: a package built for another torch may raise any error."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def _module(backend: str) -> Any:
    return importlib.import_module(PACKAGES[backend])


def flash_attn(call: Call) -> Result:
    """flash-attn 2. Its third result, the weights, exists only with dropout."""
    tensors = (item.transpose(1, 2) for item in call[:3])
    out, lse, *_ = _module("flash_attn").flash_attn_func(
        *tensors, softmax_scale=call.softmax_scale, causal=call.causal, return_attn_probs=True
    )
    return out.transpose(1, 2), _blind_rows(lse, call.key.shape[2], call.causal)


def flash_attn_3(call: Call) -> Result:
    """flash-attn 3 for Hopper. Early releases always return the pair and have no option for it."""
    function = _module("flash_attn_3").flash_attn_func
    tensors = [item.transpose(1, 2) for item in call[:3]]
    options: dict[str, Any] = {"softmax_scale": call.softmax_scale, "causal": call.causal}
    try:
        result = function(*tensors, **options, return_attn_probs=True)
    except TypeError as error:
        if "return_attn_probs" not in str(error):
            raise
        result = function(*tensors, **options)
    return result[0].transpose(1, 2), _blind_rows(result[1], call.key.shape[2], call.causal)


def _blind_rows(lse: Tensor, keys: int, causal: bool) -> Tensor:
    """Turn +inf, which flash-attn writes as the logsumexp of a row that sees no key, into -inf."""
    blind = lse.shape[2] - keys if causal else 0
    if blind > 0:
        lse = lse.clone()
        lse[:, :, :blind] = -math.inf
    return lse


class _Xformers(torch.autograd.Function):
    """Autograd function for xformers, whose calls that return the logsumexp record no gradient."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
        ops = _module("xformers")
        bias = ops.LowerTriangularMask() if causal else None
        out, lse = ops.fmha.memory_efficient_attention_forward_requires_grad(
            query, key, value, attn_bias=bias, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.causal = scale, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, *grads: Any) -> Any:
        ops = _module("xformers")
        query, key, value, out, lse = ctx.saved_tensors
        bias = ops.LowerTriangularMask() if ctx.causal else None
        given = grads[0].contiguous()
        result = ops.fmha.memory_efficient_attention_backward(
            given, out, lse, query, key, value, attn_bias=bias, scale=ctx.scale
        )
        return *result, None, None


def xformers(call: Call) -> Result:
    """Memory-efficient attention of xformers, with any of its kernels."""
    tensors = (item.transpose(1, 2) for item in (call.query, *call.repeated()))
    out, lse = _Xformers.apply(*tensors, call.softmax_scale, call.causal)
    # Some of its kernels pad the rows of the logsumexp.
    return out.transpose(1, 2), lse[:, :, : call.query.shape[2]]
