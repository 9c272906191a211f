"""Attention of the optional packages flash-attn (2, 3 and 4) and xformers, and of torch.nn.attention.

Each adapter takes a call and returns what `flash_attention` returns. The logsumexp of all these packages is
a natural logarithm. flash-attn and xformers take (batch, tokens, heads, width) and return the logsumexp as
(batch, heads, queries). ``varlen_attn`` takes (batch * tokens, heads, width) and returns it as
(heads, batch * queries). ``flex_attention`` has the layout of `flash_attention`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .call import Call, Result

PACKAGES = {
    "flash_attn": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "xformers": "xformers.ops",
    "varlen_attn": "torch.nn.attention.varlen",
    "flex_attention": "torch.nn.attention.flex_attention",
}
"""Backend names and the modules that they need."""

_MEMBERS = {
    "flash_attn": ("flash_attn_func",),
    "flash_attn_3": ("flash_attn_func",),
    "flash_attn_4": ("flash_attn_func",),
    "xformers": ("fmha", "LowerTriangularMask"),
    "varlen_attn": ("varlen_attn", "AuxRequest"),
    "flex_attention": ("flex_attention", "AuxRequest", "create_block_mask"),
}
"""What each adapter takes from its module, its attention first."""

_NEEDED = {
    # The logsumexp of earlier flash-attn 4 has no gradient.
    "flash_attn_4": ("return_lse", "score_mod"),
    "varlen_attn": ("return_aux", "enable_gqa"),
    "flex_attention": ("return_aux",),
}
"""The arguments without which an adapter cannot call the attention of an early release."""

_WINDOW = {
    "flash_attn": "window_size",
    "flash_attn_3": "window_size",
    "flash_attn_4": "window_size",
    "varlen_attn": "window_size",
    "flex_attention": "block_mask",
}
_SOFTCAP = {
    "flash_attn": "softcap",
    "flash_attn_3": "softcap",
    "flash_attn_4": "softcap",
    "flex_attention": "score_mod",
}
"""The arguments for sliding windows and soft caps; what is not here has none."""


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
    if folders and spec.origin is None and name == package:
        return (
            f"the package {package} is not installed: {next(iter(folders))} is a namespace package without "
            "code of its own (flash-attn 4 alone leaves such a flash_attn)",
        )
    if not torch.cuda.is_available() and backend != "flex_attention":
        return ("no CUDA device",)
    module = _imported(name)
    if isinstance(module, Exception):
        return (f"importing {name} failed: {module}",)
    lacking = [member for member in _MEMBERS[backend] if not hasattr(module, member)]
    if lacking:
        return tuple(f"{name} has no {member}: another package or release" for member in lacking)
    return _lacking(backend, _NEEDED.get(backend, ()))


def _lacking(backend: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Which arguments the attention of an installed package does not take."""
    name = _MEMBERS[backend][0]
    function = getattr(_imported(PACKAGES[backend]), name, None)
    known = inspect.signature(function).parameters if callable(function) else arguments
    return tuple(f"{name} has no argument {item}: another release" for item in arguments if item not in known)


@torch.compiler.assume_constant_result
def no_window(backend: str) -> tuple[str, ...]:
    """Why a backend cannot limit the keys of a row to a window."""
    if backend not in _WINDOW:
        return ("sliding windows are not supported",)
    return _lacking(backend, (_WINDOW[backend],))


@torch.compiler.assume_constant_result
def no_softcap(backend: str) -> tuple[str, ...]:
    """Why a backend cannot bend the scores."""
    if backend not in _SOFTCAP:
        return ("soft caps are not supported",)
    return _lacking(backend, (_SOFTCAP[backend],))


@torch.compiler.assume_constant_result
def other_alignment(backend: str) -> tuple[str, ...]:
    """Why a backend's causal mask differs from ours if the numbers of queries and keys differ.

    flash-attn aligns the last query with the last key, as we do, since 2.1 (its README, "Changelog").
    """
    if backend in ("flash_attn_3", "flash_attn_4", "varlen_attn", "flex_attention"):
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


def _options(call: Call, no_limit: int | None = -1) -> dict[str, Any]:
    """The arguments of flash-attn; those of later releases only where they are needed."""
    options: dict[str, Any] = {"softmax_scale": call.softmax_scale, "causal": call.causal}
    if call.slides:
        options["window_size"] = tuple(no_limit if size < 0 else size for size in call.window)
    if call.softcap:
        options["softcap"] = call.softcap
    return options


def flash_attn(call: Call) -> Result:
    """flash-attn 2. Its third result, the weights, exists only with dropout."""
    tensors = (item.transpose(1, 2) for item in call[:3])
    out, lse, *_ = _module("flash_attn").flash_attn_func(*tensors, **_options(call), return_attn_probs=True)
    return out.transpose(1, 2), _blind_rows(lse, call)


def flash_attn_3(call: Call) -> Result:
    """flash-attn 3 for Hopper. Early releases always return the pair and have no option for it."""
    function = _module("flash_attn_3").flash_attn_func
    tensors = [item.transpose(1, 2) for item in call[:3]]
    options = _options(call)
    try:
        result = function(*tensors, **options, return_attn_probs=True)
    except TypeError as error:
        if "return_attn_probs" not in str(error):
            raise
        result = function(*tensors, **options)
    return result[0].transpose(1, 2), _blind_rows(result[1], call)


def _blind_rows(lse: Tensor, call: Call) -> Tensor:
    """Turn +inf, which flash-attn writes as the logsumexp of a row that sees no key, into -inf."""
    right = call.window[1]
    blind = lse.shape[2] - call.key.shape[2] - right if right >= 0 else 0
    if blind > 0:
        lse = lse.clone()
        lse[:, :, :blind] = -math.inf
    return lse


def flash_attn_4(call: Call) -> Result:
    """flash-attn 4 for Hopper and Blackwell: no limit is None, and the logsumexp has a gradient.

    A row that sees no key has a logsumexp of -inf.
    """
    tensors = (item.transpose(1, 2) for item in call[:3])
    out, lse = _module("flash_attn_4").flash_attn_func(*tensors, **_options(call, None), return_lse=True)
    return out.transpose(1, 2), lse


def varlen_attn(call: Call) -> Result:
    """torch's attention of packed sequences; all sequences have one length here."""
    module = _module("varlen_attn")
    batch, queries, keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    starts = [
        torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=call.query.device)
        for size in (queries, keys)
    ]
    # Without a window torch may take cuDNN, which returns the logsumexp in another layout. A window over
    # everything costs nothing: flash attention drops it.
    whole = max(queries, keys)
    out, lse = module.varlen_attn(
        *(item.transpose(1, 2).flatten(0, 1) for item in call[:3]),
        *(*starts, queries, keys),
        return_aux=module.AuxRequest(lse=True),
        scale=call.softmax_scale,
        window_size=(whole, whole) if call.window == (-1, -1) else call.window,
        enable_gqa=call.groups > 1,
    )
    lse = lse.unflatten(1, (batch, queries)).transpose(0, 1)
    return out.unflatten(0, (batch, queries)).transpose(1, 2), _blind_rows(lse, call)


def flex_attention(call: Call) -> Result:
    """torch's attention of any mask and score: compiled on CUDA; on the CPU as it is, with the whole map."""
    module = _module("flex_attention")
    queries, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    # Python numbers in the two functions below would compile them again for each value, a few times at most.
    limits = (queries + keys if size < 0 else size for size in call.window)
    shift, left, right = (torch.tensor(number, device=device) for number in (keys - queries, *limits))
    cap = torch.tensor(call.softcap, dtype=checks.accumulate_dtype(call.query.dtype), device=device)

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        apart = column - row - shift
        return (apart >= -left) & (apart <= right)

    def bent(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    mask = None
    if call.window != (-1, -1):
        mask = module.create_block_mask(seen, None, None, queries, keys, device=device)
    # For fewer than 128 queries torch chooses another kernel. It needs a mask whose blocks hold all queries
    # of a group of heads, and these blocks have 128 rows.
    short = mask is not None and queries * call.groups > 128
    # On the CPU torch refuses tensors that could have a gradient, also where none is recorded.
    tensors = call[:3] if torch.is_grad_enabled() else [item.detach() for item in call[:3]]
    out, found = _flex(device.type)(
        *tensors,
        score_mod=bent if call.softcap else None,
        block_mask=mask,
        scale=call.softmax_scale,
        enable_gqa=call.groups > 1,
        kernel_options={"BACKEND": "TRITON"} if short else None,
        return_aux=module.AuxRequest(lse=True),
    )
    return out, found.lse


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    function = _module("flex_attention").flex_attention
    return function if device == "cpu" else torch.compile(function)


DIFFERENTIABLE = (flash_attn_4, flex_attention)
"""The adapters whose logsumexp has the gradient of their package."""


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
