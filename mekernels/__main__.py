"""``python -m mekernels``: which backends can run on this machine, and why the others cannot."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import __version__, backends, native
from .flash_attention import abilities


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        capability = f"{device.major}.{device.minor}"
        lines.append(f"cuda:{index}: {device.name}, compute capability {capability}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        lines.append(f"cuda: none ({'no device found' if built else 'torch was built without CUDA'})")
    return lines


def report() -> str:
    """The whole report as text."""
    packages = ("triton", "flash-attn", "flash-attn-4", "xformers", "transformers", "diffusers")
    lines = ["Versions", f"  mekernels {__version__}", f"  python {platform.python_version()}"]
    lines += [f"  torch {torch.__version__}", *(f"  {package} {_version(package)}" for package in packages)]
    lines += ["", "Devices", *(f"  {line}" for line in _devices())]
    lines += ["", "Native libraries", *(f"  {line}" for line in _native())]
    lines += ["", "Backends of each op, in the order in which auto tries them"]
    for op in backends.ops():
        lines.append(f"  {op}")
        for name, backend in backends.table(op).items():
            reasons = backend.machine()
            lines.append(f"    {name}: {'no: ' + '; '.join(reasons) if reasons else 'yes'}")
        if not op.endswith("_backward"):
            lines.append("    reference: yes, only when asked for")
    lines += [
        "",
        "What the backends of flash_attention can do",
        *(f"  {line}" for line in abilities.report()),
    ]
    lines += ["", "Environment variables"]
    for name, meaning in backends.ENVIRONMENT.items():
        lines.append(f"  {name}={os.environ.get(name, '(not set)')}  {meaning}")
    return "\n".join(lines)


def _native() -> list[str]:
    lines = []
    for device in ("cpu", "cuda"):
        reasons = native.device_reasons(torch.device(device))
        lines.append(f"{device}: {'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    return lines


if __name__ == "__main__":
    print(report())
