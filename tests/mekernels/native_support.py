"""Where the native functions can run: every vector level, the CUDA kernels on the host, and a GPU."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mekernels import native
from mekernels.native import build
from mekernels.native import library as native_loader
from mekernels.native.library import CUDA, Library

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LEVELS = ["baseline", "avx2", "avx512"]
EMULATOR = {
    "cuda_on_host_register": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32],
    "cuda_on_host_clear": [],
    "cuda_on_host_reverse": [ctypes.c_int32],
}

needs_library = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not() or 'here'}"
)


@cache
def host_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mek_cuda_on_host_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def cuda_on_host() -> tuple[Library, Any]:
    """The CUDA library compiled as C++ against csrc/tests/cuda_on_host, and its controls."""
    cxx = build.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler to compile the CUDA kernels for the host")
    emulator = CSRC / "tests" / "cuda_on_host"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{folder}" for folder in (emulator, CSRC / "include", CSRC / "cuda")]
    sources = [*CSRC.glob("common/*.cpp"), *CSRC.glob("cuda/*.cu"), *emulator.glob("*.cpp")]
    objects = [host_folder() / f"{source.name}.o" for source in sources]

    def compile_one(pair: tuple[Path, Path]) -> None:
        command = [*cxx, *flags, "-x", "c++", "-c", str(pair[0]), "-o", str(pair[1])]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    path = host_folder() / "libmek_cuda_on_host.so"
    subprocess.run([*cxx, "-shared", "-o", str(path), *map(str, objects)], check=True)
    controls = ctypes.CDLL(str(path))
    for name, argtypes in EMULATOR.items():
        getattr(controls, name).argtypes = argtypes
    return Library(str(path), CUDA), controls


def register(controls: Any, tensors: list[Any], device: int = 0) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            controls.cuda_on_host_register(tensor.data_ptr(), tensor.nbytes, device)


def aligned_bytes(count: int) -> Tensor:
    """Workspace on a 256-byte boundary, as a GPU's allocator gives it, filled with NaN bits."""
    whole = torch.full((count + 256,), 255, dtype=torch.uint8)
    start = -whole.data_ptr() % 256
    return whole[start : start + count]


def run_on_host(name: str, device: torch.device, arguments: Any, sizes: Any = ()) -> None:
    """Run like native_loader.run for CUDA tensors, with the CUDA kernels compiled for the host."""
    library, controls = cuda_on_host()
    values = [native_loader.address(value) for value in arguments]
    tensors = list(arguments)
    if sizes:
        needed = ctypes.c_int64()
        library.call(f"mek_cuda_{name}_workspace", *sizes, ctypes.addressof(needed))
        workspace = aligned_bytes(needed.value)
        tensors.append(workspace)
        values += [workspace.data_ptr(), needed.value]
    controls.cuda_on_host_clear()
    register(controls, tensors)
    library.call(f"mek_cuda_{name}", *values, 0, None)


def available_levels() -> list[str]:
    """Vector levels that this machine runs."""
    if not native.available():
        return []
    library = native_loader.library_for(torch.device("cpu"))
    found = []
    for level in LEVELS:
        try:
            library.call("mek_cpu_set_level", level.encode())
        except RuntimeError:
            continue
        found.append(level)
    library.call("mek_cpu_set_level", b"auto")
    return found


@pytest.fixture(params=[*LEVELS, "cuda_on_host", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request, monkeypatch):
    """Device on which the native functions then run."""
    if request.param == "cuda":
        if not native.cuda_available():
            pytest.skip(f"no native CUDA library: {native.cuda_why_not()}")
        yield torch.device("cuda")
    elif request.param == "cuda_on_host":
        cuda_on_host()
        monkeypatch.setattr(native.functions, "run", run_on_host)
        yield torch.device("cpu")
    else:
        if not native.available():
            pytest.skip(f"no native library: {native.why_not()}")
        if request.param not in available_levels():
            pytest.skip(f"this machine or build does not run {request.param}")
        library = native_loader.library_for(torch.device("cpu"))
        library.call("mek_cpu_set_level", request.param.encode())
        yield torch.device("cpu")
        library.call("mek_cpu_set_level", b"auto")
