"""Builds the native libraries; ``python -m mekernels.build`` is the command.

``setup.py`` loads this file by its path when only setuptools and ninja are installed, so it imports only the
standard library. docs/building.md lists the environment variables.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
NATIVE = ROOT / "mekernels" / "_native"
REPORT = "build_report.json"
CPU_LIBRARY = "libmek_cpu.so"
CUDA_LIBRARY = "libmek_cuda.so"

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
CXX_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Files that are compiled for wider vectors than the rest; one is chosen at run time.
X86_LEVELS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx2", "-mfma"]}
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static"]
NVCC_HOST_FLAGS = "-fPIC,-fvisibility=hidden"
CUDA_ARCHITECTURES = "80;90"


class BuildError(RuntimeError):
    """A requested library could not be built."""


@dataclass
class Library:
    """The part of the build report about one library."""

    library: str | None = None
    why_not: str | None = None
    compiler: str | None = None
    targets: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "built": self.library is not None,
            "library": self.library,
            "why_not": self.why_not,
            "compiler": self.compiler,
            "targets": self.targets,
        }


def switch(name: str) -> str:
    """The value of an environment variable that is auto, 0 or 1."""
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise BuildError(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def abi_version() -> int:
    """The interface version that the header declares."""
    text = (SOURCES / "include" / "mek.h").read_text(encoding="utf-8")
    found = re.search(r"#define MEK_ABI_VERSION (\d+)", text)
    if not found:
        raise BuildError("csrc/include/mek.h declares no MEK_ABI_VERSION")
    return int(found.group(1))


def first_command(*candidates: str | None) -> list[str] | None:
    """The first candidate whose program exists, split into words."""
    for candidate in candidates:
        words = shlex.split(candidate) if candidate else []
        if words and shutil.which(words[0]):
            return words
    return None


def find_cxx() -> list[str] | None:
    """The C++ compiler: $CXX if it is set, else the first of the usual names."""
    if os.environ.get("CXX"):
        return first_command(os.environ["CXX"])
    return first_command("c++", "g++", "clang++")


def find_nvcc() -> list[str] | None:
    """The CUDA compiler: $CUDACXX, $CUDA_HOME, $CUDA_PATH, then PATH, then the usual folder."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX")]
    candidates += [shlex.quote(str(Path(home) / "bin" / "nvcc")) for home in homes if home]
    return first_command(*candidates, "nvcc", "/usr/local/cuda/bin/nvcc")


def find_ninja() -> list[str] | None:
    """Ninja from its Python package (as in an isolated build) or from PATH."""
    try:
        import ninja
    except ImportError:
        return first_command("ninja")
    return first_command(shlex.quote(str(Path(ninja.BIN_DIR) / "ninja")), "ninja")


def run(command: list[str], cwd: Path | None = None) -> tuple[int, str]:
    """Exit status and combined output; a program that cannot be started counts as a failure."""
    try:
        done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def version_line(command: list[str], pattern: str = r".+") -> str:
    """The last line of ``--version`` that matches the pattern."""
    found = re.findall(pattern, run([*command, "--version"])[1])
    return found[-1].strip() if found else "unknown"


def cpu_levels(cxx: list[str]) -> dict[str, list[str]]:
    """The vector variants, besides the baseline, for the machine that the compiler targets."""
    machine = run([*cxx, "-dumpmachine"])[1].strip().split("-")[0]
    return dict(X86_LEVELS) if machine in ("x86_64", "amd64") else {}


def gencode(architectures: str) -> list[str]:
    """nvcc flags: machine code for every architecture, and PTX for the newest one."""
    numbers = [part for part in re.split(r"[;,\s]+", architectures) if part]
    if not numbers or not all(re.fullmatch(r"\d+[af]?", number) for number in numbers):
        raise BuildError(f'MEKERNELS_CUDA_ARCHS must be numbers such as "80;90", got {architectures!r}')
    flags = []
    for number in numbers:
        code = f"[sm_{number},compute_{number}]" if number == numbers[-1] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


class Ninja:
    """Text of a build.ninja file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5", ""]

    @staticmethod
    def path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    @staticmethod
    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", "  description = $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def build(self, rule: str, output: Path, inputs: list[Path], flags: list[str] | None = None) -> Path:
        self.lines.append(f"build {self.path(output)}: {rule} {' '.join(self.path(i) for i in inputs)}")
        if flags is not None:
            self.lines.append(f"  flags = {self.command(flags)}")
        return output

    def write(self) -> None:
        text = "\n".join(self.lines) + "\n"
        target = self.folder / "build.ninja"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def export_options() -> list[str]:
    """Linker options that hide all symbols but those of the C interface."""
    return [f"--version-script={SOURCES / 'exports.map'}"] if sys.platform.startswith("linux") else []


def add_cpu(ninja: Ninja, cxx: list[str], levels: dict[str, list[str]], extra: list[str]) -> Path:
    """Rules and targets of the CPU library; returns its path in the build folder."""
    include = [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cpu'}"]
    defines = [f"-DMEK_HAVE_{level.upper()}" for level in levels]
    compiler = Ninja.command(cxx)
    ninja.rule("cxx", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
    ninja.rule("link", f"{compiler} -shared $in -o $out $flags")
    objects = []
    for source in [*sorted((SOURCES / "common").glob("*.cpp")), *sorted((SOURCES / "cpu").glob("*.cpp"))]:
        level = source.stem.removeprefix("kernels_")
        if level in X86_LEVELS and level not in levels:
            continue
        flags = [*CXX_FLAGS, *include, *defines, *levels.get(level, []), *extra]
        objects.append(ninja.build("cxx", ninja.folder / f"{source.stem}.o", [source], flags))
    flags = ["-pthread", *(f"-Wl,{option}" for option in export_options()), *extra]
    return ninja.build("link", ninja.folder / CPU_LIBRARY, objects, flags)


def add_cuda(ninja: Ninja, cxx: list[str], nvcc: list[str], architectures: str) -> Path:
    """Rules and targets of the CUDA library; returns its path in the build folder."""
    include = [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cuda'}"]
    host = ["-ccbin", shutil.which(cxx[-1]) or cxx[-1]]
    compiler = Ninja.command([*nvcc, *host])
    ninja.rule("nvcc", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
    ninja.rule("cuda_link", f"{compiler} -shared $in -o $out $flags")
    flags = [*NVCC_FLAGS, *gencode(architectures), "-Xcompiler", NVCC_HOST_FLAGS, *include]
    objects = [ninja.folder / f"{source.stem}.o" for source in sorted((SOURCES / "common").glob("*.cpp"))]
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        objects.append(ninja.build("nvcc", ninja.folder / f"{source.stem}.cu.o", [source], flags))
    link = ["-cudart", "static", *(word for option in export_options() for word in ("-Xlinker", option))]
    return ninja.build("cuda_link", ninja.folder / CUDA_LIBRARY, objects, link)


def tail(text: str, lines: int = 40) -> str:
    """The end of a long output, where compilers print the error."""
    return "\n".join(text.strip().splitlines()[-lines:])


def make(ninja: list[str], folder: Path, targets: dict[str, Path], verbose: bool) -> dict[str, str]:
    """Build all targets in parallel; returns the output of those that failed."""
    jobs = os.environ.get("MAX_JOBS", "")
    base = [*ninja, "-C", str(folder), *(["-j", jobs] if jobs else []), *(["-v"] if verbose else [])]
    status, output = run([*base, "-k", "0", *(str(path) for path in targets.values())])
    if verbose or status:
        print(output)
    if status == 0:
        return {}
    failed = {}
    for name, path in targets.items():
        status, output = run([*base, str(path)])
        if status:
            failed[name] = tail(output)
    return failed


def install(source: Path, destination: Path) -> None:
    """Put a library in place atomically. A process that has mapped the old library keeps it."""
    temporary = destination.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, destination)


def plan_cpu() -> tuple[Library, list[str] | None, list[str] | None]:
    """The reason why the CPU library cannot be built, its compiler, and ninja."""
    cpu = Library()
    if switch("MEKERNELS_NATIVE") == "0":
        cpu.why_not = "switched off by MEKERNELS_NATIVE=0"
        return cpu, None, None
    if sys.platform == "win32":
        cpu.why_not = "the native libraries are built on Linux and macOS only"
        return cpu, None, None
    cxx, ninja = find_cxx(), find_ninja()
    if cxx is None:
        named = f" (CXX={os.environ['CXX']})" if os.environ.get("CXX") else ""
        cpu.why_not = f"no C++ compiler found{named}"
    elif ninja is None:
        cpu.why_not = "ninja not found: pip install ninja"
    else:
        cpu.compiler = version_line(cxx, r".*\d+\.\d+\.\d+.*")
    return cpu, cxx, ninja


def plan_cuda(cpu: Library) -> tuple[Library, list[str] | None]:
    """The reason why the CUDA library cannot be built, and its compiler."""
    cuda = Library()
    if switch("MEKERNELS_CUDA") == "0":
        cuda.why_not = "switched off by MEKERNELS_CUDA=0"
        return cuda, None
    nvcc = find_nvcc()
    if cpu.why_not:
        cuda.why_not = cpu.why_not
    elif nvcc is None:
        cuda.why_not = "nvcc not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    else:
        cuda.compiler = "nvcc " + version_line(nvcc, r"release .+")
    return cuda, nvcc


def build(destination: Path = NATIVE, folder: Path | None = None, verbose: bool = False) -> dict[str, Any]:
    """Build what this machine can build into ``destination`` and write the build report there.

    Args:
        destination: folder of the libraries and of ``build_report.json``.
        folder: folder of objects and build.ninja, kept for the next, incremental build.
        verbose: print every command and all output of the compilers.

    Returns:
        The build report: ``{"abi": int, "cpu": {...}, "cuda": {...}}``, each part with ``built``,
        ``library``, ``why_not``, ``compiler`` and ``targets``.

    Raises:
        BuildError: a switch has an invalid value, or the library of a switch that is 1 could not be built.

    Example:
        >>> from mekernels.native.build import build
        >>> build()["cpu"]["built"]  # doctest: +SKIP
        True
    """
    if not (SOURCES / "include" / "mek.h").exists():
        raise BuildError(f"{SOURCES} has no sources: rebuild from a checkout or a source distribution")
    folder = folder or ROOT / "build" / "mekernels"
    folder.mkdir(parents=True, exist_ok=True)
    destination.mkdir(parents=True, exist_ok=True)

    cpu, cxx, ninja_command = plan_cpu()
    cuda, nvcc = plan_cuda(cpu)
    ninja, targets = Ninja(folder), {}
    if not cpu.why_not and cxx:
        levels = cpu_levels(cxx)
        cpu.targets = ["baseline", *levels]
        targets["cpu"] = add_cpu(ninja, cxx, levels, shlex.split(os.environ.get("MEKERNELS_CXXFLAGS", "")))
    if not cuda.why_not and cxx and nvcc:
        architectures = os.environ.get("MEKERNELS_CUDA_ARCHS") or CUDA_ARCHITECTURES
        cuda.targets = [flag for flag in gencode(architectures) if flag.startswith("arch")]
        targets["cuda"] = add_cuda(ninja, cxx, nvcc, architectures)
    if targets and ninja_command:
        ninja.write()
        failed = make(ninja_command, folder, targets, verbose)
        cpu.why_not = failed.get("cpu", cpu.why_not)
        cuda.why_not = failed.get("cuda", cuda.why_not)

    for name, library, part in (("cpu", CPU_LIBRARY, cpu), ("cuda", CUDA_LIBRARY, cuda)):
        if part.why_not is None:
            install(targets[name], destination / library)
            part.library = library
        else:
            (destination / library).unlink(missing_ok=True)
    report = {"abi": abi_version(), "cpu": cpu.as_dict(), "cuda": cuda.as_dict()}
    (destination / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    for name, part, variable in (("cpu", cpu, "MEKERNELS_NATIVE"), ("cuda", cuda, "MEKERNELS_CUDA")):
        outcome = f"not built: {part.why_not}" if part.why_not else f"built {part.library}"
        print(f"mekernels: {name}: {outcome}")
        if part.why_not and switch(variable) == "1":
            raise BuildError(f"{variable}=1, but the {name} library was not built: {part.why_not}")
    return report
