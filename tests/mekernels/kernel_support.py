"""Inputs and the error rule shared by the tests of mekernels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mekernels.launch import Launch

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values behind another memory order and an offset."""
    order = [0, 2, 1, 3] if tensor.ndim == 4 else list(range(tensor.ndim))
    moved = tensor.permute(order)
    base = torch.full((moved.numel() + 3,), float("nan"), dtype=tensor.dtype)
    base[3:] = moved.reshape(-1)
    return base[3:].view(moved.shape).permute(order)


def assert_exact(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Agreement of float64 results relative to the largest entry."""
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual - expected).abs()
    limit = tolerance * max(1.0, expected.abs().max().item())
    wrong = ~(error <= limit)
    place = tuple(torch.nonzero(wrong)[0].tolist()) if wrong.any() else ()
    assert not wrong.any(), f"{wrong.double().mean():.1%} wrong, first at {place}, largest {error.max():.3e}"


def assert_error_rule(
    actual: Tensor, exact: Tensor, plain: Tensor, *, factor: float = 2.0, rounding: torch.dtype | None = None
) -> None:
    """Error against float64 at most ``factor`` times that of plain torch at the dtype, plus rounding."""
    assert actual.shape == exact.shape == plain.shape
    if not exact.numel():
        return
    error = (actual.double() - exact).abs()
    allowed = factor * (plain.double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(rounding or actual.dtype).eps * exact.abs().max().item()
    assert math.isfinite(allowed), "plain torch is not finite here: the rule says nothing"
    wrong = ~(error <= allowed)
    place = tuple(torch.nonzero(wrong)[0].tolist()) if wrong.any() else ()
    assert not wrong.any(), (
        f"{wrong.double().mean():.1%} of the entries wrong, first at {place}, largest {error.max():.3e}, "
        f"allowed {allowed:.3e}"
    )


def compiled_variants(launches: Iterable[Launch]) -> dict[str, set[str]]:
    """Triton's compilation keys of launches, by the name of the kernel, each key once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    found: dict[str, set[str]] = {}
    for launch in launches:
        kernel = launch.kernel
        bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        _, specialization, options = bind(**launch.arguments, **launch.options)
        found.setdefault(kernel.__name__, set()).add(f"{specialization} {sorted(options.items())}")
    return found
