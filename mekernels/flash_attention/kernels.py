"""The attention kernels of torch that return the logsumexp, and when each can run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .call import Call, Result
from .packages import no_softcap, no_window, other_alignment

aten = torch.ops.aten


def cpu_flash(call: Call) -> Result:
    query, key, value, scale, causal = call[:5]
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def common_reasons(call: Call, package: str = "") -> list[str]:
    query, key, value, scale, causal = call[:5]
    reasons = []
    if value.shape[3] != query.shape[3] and package != "flex_attention":
        reasons.append(f"value width {value.shape[3]} differs from query width {query.shape[3]}")
    if not (query.numel() and key.numel()):
        reasons.append("a tensor is empty")
    if causal and scale <= 0 and package != "flex_attention":
        reasons.append(f"causal attention needs a softmax_scale above 0: fused kernels give NaN with {scale}")
    if causal and query.shape[2] != key.shape[2]:
        reasons.extend(other_alignment(package))
    if call.slides:
        reasons.extend(no_window(package))
    if call.softcap:
        reasons.extend(no_softcap(package))
    return reasons


def cpu_flash_reasons(call: Call) -> list[str]:
    reasons = common_reasons(call)
    if call.query.device.type != "cpu":
        reasons.insert(0, f"runs on cpu, the tensors are on {call.query.device}")
    if call.query.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {call.query.dtype} is not supported")
    return reasons


def no_cuda() -> list[str]:
    return [] if torch.cuda.is_available() else ["no CUDA device"]


def cuda_reasons(call: Call, package: str = "") -> list[str]:
    reasons = common_reasons(call, package)
    if call.query.device.type != "cuda":
        return [f"runs on cuda, the tensors are on {call.query.device}", *reasons]
    if call.query.shape[3] % 8:
        reasons.append(f"width {call.query.shape[3]} is not a multiple of 8")
    if any(item.stride(3) != 1 for item in call[:3]):
        reasons.append("the width of query, key and value must have stride 1")
    return reasons


def half_reasons(query: Tensor, least: tuple[int, int]) -> list[str]:
    reasons = []
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs float16 or bfloat16, got {query.dtype}")
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < least:
        reasons.append(f"needs compute capability {least[0]}.{least[1]} or later")
    return reasons


def flash(call: Call) -> Result:
    query, key, value, scale, causal = call[:5]
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def flash_reasons(call: Call) -> list[str]:
    reasons = cuda_reasons(call) + half_reasons(call.query, (8, 0))
    if call.query.shape[3] > 256:
        reasons.append(f"width {call.query.shape[3]} is above 256")
    return reasons


def cudnn(call: Call) -> Result:
    query, key, value, scale, causal = call[:5]
    out, lse = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(query.shape[:3])


def cudnn_reasons(call: Call) -> list[str]:
    reasons = cuda_reasons(call) + half_reasons(call.query, (8, 0))
    if call.query.shape[3] > 128:
        reasons.append(f"width {call.query.shape[3]} is above 128")
    if call.query.shape[1] != call.key.shape[1]:
        reasons.append("grouped-query heads are not supported")
    return reasons


def prefers_cudnn(call: Call) -> bool:
    """On Hopper and later, cuDNN's attention is faster than torch's own, which is written for Ampere."""
    if call.query.device.type != "cuda" or torch.cuda.get_device_capability(call.query.device) < (9, 0):
        return False
    # Earlier ones gave wrong results at some lengths; torch itself avoids them.
    if (torch.backends.cudnn.version() or 0) < 91500:
        return False
    table = backends.table("flash_attention")
    if not backends.reasons_of(table["flash_attn_3"], call):
        return False
    return not backends.reasons_of(table["cudnn"], call)


def package_reasons(package: str, call: Call) -> list[str]:
    found = cuda_reasons(call, package) + half_reasons(call.query, (8, 0))
    if call.query.shape[3] > 256:
        found.append(f"width {call.query.shape[3]} is above 256")
    return found


def hopper_reasons(call: Call) -> list[str]:
    found = package_reasons("flash_attn_3", call)
    if call.query.device.type == "cuda" and torch.cuda.get_device_capability(call.query.device)[0] != 9:
        found.append("needs compute capability 9.0")
    return found


def newest_reasons(call: Call) -> list[str]:
    """flash-attn 4: its Blackwell kernels for a width of 256 have neither soft caps nor a gradient of lse."""
    found = package_reasons("flash_attn_4", call)
    if call.query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(call.query.device)
        if capability < (9, 0):
            found.append("needs compute capability 9.0 or later")
        if capability >= (10, 0) and call.query.shape[3] > 128:
            found.append(f"width {call.query.shape[3]} is above 128 with compute capability 10.0 or later")
        if capability >= (12, 0) and call.softcap:
            found.append("soft caps have no gradient with compute capability 12.0")
    return found


def flex_reasons(call: Call) -> list[str]:
    reasons = common_reasons(call, "flex_attention")
    device = call.query.device.type
    if device not in ("cpu", "cuda"):
        reasons.insert(0, f"runs on cpu and cuda, the tensors are on {call.query.device}")
    if device == "cpu" and torch.is_grad_enabled() and any(item.requires_grad for item in call[:3]):
        reasons.append("has no gradient on cpu")
    if device == "cuda" and call.query.dtype == torch.float64:
        reasons.append("dtype torch.float64 is not supported on cuda")
    return reasons


def cudnn_machine() -> list[str]:
    if no_cuda():
        return no_cuda()
    return [] if torch.backends.cudnn.is_available() else ["torch was built without cuDNN"]


def efficient(call: Call) -> Result:
    query, scale, causal = call.query, call.softmax_scale, call.causal
    key, value = call.repeated()
    out, lse = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )[:2]
    # The kernel pads the rows of its logsumexp to a multiple of 32.
    return out, lse[:, :, : query.shape[2]]


def efficient_reasons(call: Call) -> list[str]:
    reasons = cuda_reasons(call)
    if call.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {call.query.dtype} is not supported")
    return reasons
