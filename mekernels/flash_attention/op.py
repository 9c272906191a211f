"""Attention with the row logsumexp, from the best flash backend present."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends, checks, reference
from . import packages

aten = torch.ops.aten

CHUNK_ELEMENTS = 1 << 20
"""Scores the composites hold at a time."""

Result = tuple[Tensor, Tensor]


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention together with the logsumexp of every row.

    Args:
        query: (B, Hq, Nq, D), floating point, any strides.
        key: (B, Hk, Nk, D); Hk divides Hq (grouped-query heads: query head h reads key head h * Hk // Hq).
        value: (B, Hk, Nk, Dv).
        softmax_scale: factor on the scores, 1 / sqrt(D) by default.
        causal: row i sees key j when j <= i + Nk - Nq (ends aligned). A row that sees nothing gives zeros.
        backend: ``"auto"``, ``"torch"`` (chunked composite) or ``"reference"``; a kernel of torch:
            ``"cpu_flash"``, ``"flash"``, ``"cudnn"``, ``"efficient"``; or one of a package that is
            installed: ``"flash_attn_3"``, ``"flash_attn"``, ``"xformers"``. Where it is ``"auto"`` the
            backend of :func:`mekernels.use_backend` holds.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of ``query``, differentiable in query, key and value, and lse
        (B, Hq, Nq), natural logarithm, float64 for float64 input and float32 otherwise, not differentiable;
        -inf for a row that sees nothing.

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
    checks.shape("value", value, (*key.shape[:3], value.shape[3]), meaning="(those of key, any width)")
    checks.boolean("causal", causal)
    checks.choice("backend", backend, ("auto", "reference", *backends.table("flash_attention")))
    scale = checks.scale(softmax_scale, query.shape[3])
    if backend == "auto":
        backend = backends.active()
    if backend == "reference":
        out, lse = backends.by_reference(
            reference.flash_attention, query, key, value, softmax_scale=scale, causal=causal
        )
        return out.to(query.dtype), lse.to(checks.accumulate_dtype(query.dtype)).detach()
    if backend == "auto" and _prefers_cudnn(query, key, value, scale, causal):
        backend = "cudnn"
    out, lse = backends.dispatch("flash_attention", backend, query, key, value, scale, causal)
    return out, lse.detach()


def _cpu_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _common_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = []
    if value.shape[3] != query.shape[3]:
        reasons.append(f"value width {value.shape[3]} differs from query width {query.shape[3]}")
    if not (query.numel() and key.numel()):
        reasons.append("a tensor is empty")
    if causal and scale <= 0:
        reasons.append(
            f"causal attention with a scale of {scale} gives NaN in fused kernels, it must be positive"
        )
    if causal and query.shape[2] != key.shape[2]:
        reasons.append("causal attention with different query and key lengths is aligned at the other end")
    return reasons


def _cpu_flash_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = _common_reasons(query, key, value, scale, causal)
    if query.device.type != "cpu":
        reasons.insert(0, f"runs on cpu, the tensors are on {query.device}")
    if query.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {query.dtype} is not supported")
    return reasons


def _no_cuda() -> list[str]:
    return [] if torch.cuda.is_available() else ["no CUDA device"]


def _cuda_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = _common_reasons(query, key, value, scale, causal)
    if query.device.type != "cuda":
        return [f"runs on cuda, the tensors are on {query.device}", *reasons]
    if query.shape[3] % 8:
        reasons.append(f"width {query.shape[3]} is not a multiple of 8")
    if any(item.stride(3) != 1 for item in (query, key, value)):
        reasons.append("the width of query, key and value must have stride 1")
    return reasons


def _half_reasons(query: Tensor, least: tuple[int, int]) -> list[str]:
    reasons = []
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs float16 or bfloat16, got {query.dtype}")
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < least:
        reasons.append(f"needs compute capability {least[0]}.{least[1]} or later")
    return reasons


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def _flash_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = _cuda_reasons(query, key, value, scale, causal) + _half_reasons(query, (8, 0))
    if query.shape[3] > 256:
        reasons.append(f"width {query.shape[3]} is above 256")
    return reasons


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
    out, lse = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(query.shape[:3])


def _cudnn_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = _cuda_reasons(query, key, value, scale, causal) + _half_reasons(query, (8, 0))
    if query.shape[3] > 128:
        reasons.append(f"width {query.shape[3]} is above 128")
    if query.shape[1] != key.shape[1]:
        reasons.append("grouped-query heads are not supported")
    return reasons


def _prefers_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> bool:
    """On Hopper and later cuDNN's attention outruns torch's own, which is written for Ampere."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (9, 0):
        return False
    # Earlier ones gave wrong results at some lengths; torch itself avoids them.
    if (torch.backends.cudnn.version() or 0) < 91500:
        return False
    table = backends.table("flash_attention")
    if not backends.reasons_of(table["flash_attn_3"], query, key, value, scale, causal):
        return False
    return not backends.reasons_of(table["cudnn"], query, key, value, scale, causal)


def _package_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    found = _cuda_reasons(query, key, value, scale, causal) + _half_reasons(query, (8, 0))
    if query.shape[3] > 256:
        found.append(f"width {query.shape[3]} is above 256")
    return found


def _hopper_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    found = _package_reasons(query, key, value, scale, causal)
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] != 9:
        found.append("needs compute capability 9.0")
    return found


def _cudnn_machine() -> list[str]:
    if _no_cuda():
        return _no_cuda()
    return [] if torch.backends.cudnn.is_available() else ["torch was built without cuDNN"]


def _efficient(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
    out, lse = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )[:2]
    # The kernel pads the rows of its logsumexp to a multiple of 32.
    return out, lse[:, :, : query.shape[2]]


def _efficient_reasons(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> list[str]:
    reasons = _cuda_reasons(query, key, value, scale, causal)
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {query.dtype} is not supported")
    return reasons


def _composite(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Result:
    return flash_attention_op(query, key, value, scale, causal)


def _blocks(
    query: Tensor, key: Tensor, scale: float, causal: bool
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Scores of a few rows of one head at a time, as (sample, head, rows, (rows, Nk) scores)."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    step = max(1, CHUNK_ELEMENTS // max(1, keys))
    position = torch.arange(keys, device=query.device)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys_t = key[sample, head // groups].to(dtype).T
            for start in range(0, queries, step):
                rows = slice(start, min(start + step, queries))
                scores = (query[sample, head, rows].to(dtype) * scale) @ keys_t
                if causal:
                    last = torch.arange(rows.start, rows.stop, device=query.device) + keys - queries
                    scores.masked_fill_(position > last[:, None], -math.inf)
                yield sample, head, rows, scores


@torch.library.custom_op("mekernels::flash_attention", mutates_args=())
def flash_attention_op(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The chunked composite: any dtype, width and length, memory O(Nk) beyond its results."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -math.inf, dtype=dtype)
    if not key.shape[2]:
        return out, lse
    for sample, head, rows, scores in _blocks(query, key, softmax_scale, causal):
        total = scores.logsumexp(-1)
        weights = scores.sub_(total.masked_fill(total == -math.inf, 0)[:, None]).exp_()
        out[sample, head, rows] = (weights @ value[sample, head // groups].to(dtype)).to(out.dtype)
        lse[sample, head, rows] = total
    return out, lse


@flash_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool) -> Result:
    lse = query.new_empty(query.shape[:3], dtype=checks.accumulate_dtype(query.dtype))
    return query.new_empty(*query.shape[:3], value.shape[3]), lse


@torch.library.custom_op("mekernels::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, recomputing the weights chunk by chunk."""
    dtype = checks.accumulate_dtype(query.dtype)
    groups = query.shape[1] // key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.zeros_like(item, dtype=dtype, memory_format=torch.contiguous_format)
        for item in (query, key, value)
    )
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    for sample, head, rows, scores in _blocks(query, key, softmax_scale, causal):
        group = head // groups
        total = lse[sample, head, rows]
        weights = scores.sub_(total.masked_fill(total == -math.inf, 0)[:, None]).exp_()
        given = grad[sample, head, rows].to(dtype)
        grad_value[sample, group] += weights.T @ given
        slope = given @ value[sample, group].to(dtype).T
        slope.sub_(delta[sample, head, rows, None]).mul_(weights).mul_(softmax_scale)
        grad_query[sample, head, rows] = slope @ key[sample, group].to(dtype)
        grad_key[sample, group] += slope.T @ query[sample, head, rows].to(dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


@flash_attention_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output) -> None:
    query, key, value, ctx.softmax_scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, grad, _):
    grads = flash_attention_backward_op(grad, *ctx.saved_tensors, ctx.softmax_scale, ctx.causal)
    return *grads, None, None


flash_attention_op.register_autograd(_backward, setup_context=_setup)

backends.register("flash_attention", "cpu_flash", _cpu_flash, reasons=_cpu_flash_reasons)
backends.register(
    "flash_attention",
    "flash_attn_3",
    packages.flash_attn_3,
    reasons=_hopper_reasons,
    machine=lambda: list(packages.missing("flash_attn_3")),
)
backends.register("flash_attention", "flash", _flash, reasons=_flash_reasons, machine=_no_cuda)
backends.register("flash_attention", "cudnn", _cudnn, reasons=_cudnn_reasons, machine=_cudnn_machine)
backends.register(
    "flash_attention",
    "flash_attn",
    packages.flash_attn,
    reasons=_package_reasons,
    machine=lambda: list(packages.missing("flash_attn")),
)
backends.register(
    "flash_attention",
    "xformers",
    packages.xformers,
    reasons=_package_reasons,
    machine=lambda: list(packages.missing("xformers")),
)
backends.register("flash_attention", "efficient", _efficient, reasons=_efficient_reasons, machine=_no_cuda)
backends.register("flash_attention", "torch", _composite)
