"""The cost of every Triton kernel on its target GPUs, found by compiling it. No GPU is needed.

``python -m mekernels.resources [part of a name]`` prints a table, ``--json`` prints all results, and ``--dump
DIR`` writes the machine code. :mod:`mekernels.resources.prediction` says what is predicted and how. The
``plan.py`` of an op adds its kernels with a function ``gates()`` that returns a list of :class:`Gate`,
kernels at production shapes::

    def gates() -> list[Gate]:
        query = torch.empty(1, 48, 17776, 64, dtype=torch.float16, device="meta")
        return [Gate("my_op CogVideoX-5B float16", plan(query, ...), matrix_shaped=True)]

``plan`` is the module's function from tensors to a :class:`mekernels.launch.Launch`, so the judged kernel is
the kernel that would run. A kernel passes if no register spills, shared memory is within the GPU's
limit, and a ``matrix_shaped`` kernel has matrix instructions. Set ``matrix_shaped`` for half-precision types;
exact float32 products have no matrix instruction.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import Launch, planned_for
from . import sass

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Compute capability → bytes of shared memory that one program may use."""

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Gate(NamedTuple):
    """A kernel at one shape and dtype that must compile well."""

    name: str
    launch: Launch
    """Tensors in its arguments are on the meta device."""
    matrix_shaped: bool


class Resources(NamedTuple):
    """What a compiled kernel uses."""

    registers: int
    """Per thread."""
    shared: int
    """Bytes per program."""
    spills: int
    """Bytes of local memory and stack per thread, plus instructions that use them."""
    matrix_instructions: int


def modules() -> list[Any]:
    """The modules that hold kernels or launch them. Needs triton."""
    folder = Path(__file__).parents[1]
    paths = sorted([*folder.glob("*/triton*.py"), *folder.glob("*/plan.py")])
    return [importlib.import_module(f"mekernels.{path.parent.name}.{path.stem}") for path in paths]


def gates(capability: int = 90) -> list[Gate]:
    """All gates of all kernel modules, planned for a GPU of :data:`mekernels.launch.TARGETS`.

    :func:`ungated` lists the kernels without a gate.
    """
    with planned_for(capability):
        return [gate for module in modules() for gate in getattr(module, "gates", list)()]


def ungated() -> list[str]:
    """Kernels without a gate: ``@triton.jit`` functions that neither a gate nor another of them uses."""
    from triton.runtime.jit import JITFunction

    found = {
        f"{module.__name__}.{name}": item
        for module in modules()
        for name, item in vars(module).items()
        if isinstance(item, JITFunction) and item.fn.__module__ == module.__name__
    }
    gated = {id(gate.launch.kernel) for gate in gates()}
    sources = {name: inspect.getsource(item.fn) for name, item in found.items()}

    def used(name: str) -> bool:
        call = re.compile(rf"\b{re.escape(name.rpartition('.')[2])}\(")
        return any(call.search(source) for other, source in sources.items() if other != name)

    return sorted(name for name, item in found.items() if id(item) not in gated and not used(name))


def compile_for(launch: Launch, capability: int) -> Any:
    """Compile a launch as triton would on a GPU of this compute capability (80, 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def described(value: Any, place: tuple[int, ...], parameter: Any) -> Any:
        # Triton makes a version of its own for an integer that is 1 and for one that 16 divides, unless the
        # parameter is exempt, which does not reach into tuples.
        if isinstance(value, tuple):
            return tuple(described(item, (*place, index), None) for index, item in enumerate(value))
        constant = parameter is not None and parameter.is_constexpr
        exempt = parameter is not None and parameter.do_not_specialize
        aligned = not exempt and not (parameter is not None and parameter.do_not_specialize_on_alignment)
        if constant or value is None or (isinstance(value, int) and value == 1 and not exempt):
            constants[place] = value
            return "constexpr"
        if aligned and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = described(value, (index,), parameter)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def run_tool(name: str, *arguments: str) -> str:
    """The output of ``cuobjdump`` or ``nvdisasm``, which come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def usage(binary: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED and LOCAL of every function of a cubin or a library, by architecture and name."""
    return parse_usage(run_tool("cuobjdump", "--dump-resource-usage", str(binary)))


def parse_usage(text: str) -> dict[str, dict[str, int]]:
    """The result of :func:`usage`, from the text of ``cuobjdump``.

    Raises:
        RuntimeError: there is no function, or a function lacks one of the four numbers.
    """
    found: dict[str, dict[str, int]] = {}
    architecture = ""
    for line in text.splitlines():
        named = re.search(r"\barch = (sm_\d+)", line)
        function = re.match(r"\s*Function (\S+):\s*$", line)
        if named:
            architecture = named.group(1)
        elif function:
            current = found.setdefault(f"{architecture} {function.group(1)}".strip(), {})
        elif "REG:" in line:
            numbers = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)
            current.update({name: int(value) for name, value in numbers})
    if not found or any(set(item) != {"REG", "STACK", "SHARED", "LOCAL"} for item in found.values()):
        raise RuntimeError(f"cuobjdump must list registers, stack, shared and local memory, got {text!r}")
    return found


class Compiled(NamedTuple):
    """A launch for one compute capability."""

    resources: Resources
    code: list[sass.Instruction]
    cubin: bytes
    ir: str
    """Triton's own IR, which does not depend on the GPU."""
    sass: str
    """The disassembly, with places in the source."""


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch and read its resources from the machine code."""
    result = compile_for(launch, capability)
    cubin = result.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # A cubin lists its functions; a cubin of Triton holds one.
        (numbers,) = usage(Path(file.name)).values()
        text = run_tool("nvdisasm", "-c", "-gi", file.name)
    code = sass.parse(text)
    found = Resources(
        registers=numbers["REG"],
        shared=max(result.metadata.shared, numbers["SHARED"]),
        spills=numbers["STACK"] + numbers["LOCAL"] + sum(item.pipe == "local" for item in code),
        matrix_instructions=sum(item.pipe == "tensor" for item in code),
    )
    return Compiled(found, code, cubin, result.asm["ttir"], text)


def measure(launch: Launch, capability: int) -> Resources:
    """The resources of a launch on a compute capability."""
    return compiled(launch, capability).resources


def faults(gate: Gate, capability: int, found: Resources) -> list[str]:
    """The faults of a compiled kernel; empty if there are none."""
    wrong = []
    if found.spills:
        wrong.append(f"spills registers ({found.spills})")
    if found.shared > SHARED_LIMIT[capability]:
        wrong.append(f"needs {found.shared} bytes of shared memory, above {SHARED_LIMIT[capability]}")
    if gate.matrix_shaped and not found.matrix_instructions:
        wrong.append("has no matrix instruction")
    return [f"{gate.name}, sm_{capability}: {fault}" for fault in wrong]
