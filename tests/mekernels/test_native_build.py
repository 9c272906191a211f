"""The build with and without its compilers, incremental, and in a wheel."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from native_support import CSRC

from mekernels import build as command
from mekernels.native import build
from mekernels.native.library import CPU, Library

ROOT = CSRC.parent
SWITCHES = ["MEKERNELS_CUDA", "MEKERNELS_NATIVE", "MEKERNELS_CUDA_ARCHS", "MEKERNELS_CXXFLAGS"]
SWITCHES += ["CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"]

needs_cxx = pytest.mark.skipif(build.find_cxx() is None, reason="no C++ compiler")
needs_ninja = pytest.mark.skipif(build.find_ninja() is None, reason="no ninja")
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


def hide(monkeypatch, *words):
    """Make programs whose name holds one of the words impossible to find."""
    real = shutil.which
    monkeypatch.setattr(
        build.shutil,
        "which",
        lambda name: None if any(word in Path(name).name for word in words) else real(name),
    )


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """One folder of objects for all tests here, with a blank in its name."""
    return tmp_path_factory.mktemp("build") / "some objects"


def report_of(folder):
    return json.loads((folder / build.REPORT).read_text(encoding="utf-8"))


def test_no_compiler_at_all(monkeypatch, tmp_path, capsys):
    hide(monkeypatch, "c++", "g++", "clang++", "nvcc")
    (tmp_path / build.CPU_LIBRARY).write_text("of an earlier build")
    report = build.build(tmp_path, tmp_path / "objects")
    assert report == report_of(tmp_path)
    assert not report["cpu"]["built"]
    assert report["cpu"]["why_not"] == report["cuda"]["why_not"] == "no C++ compiler found"
    assert not (tmp_path / build.CPU_LIBRARY).exists()
    assert "mekernels: cpu: not built: no C++ compiler found\n" in capsys.readouterr().out


def test_a_compiler_that_is_named_but_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    assert (
        build.build(tmp_path, tmp_path)["cpu"]["why_not"] == "no C++ compiler found (CXX=/nowhere/g++ -m64)"
    )


def test_no_ninja(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_ninja", lambda: None)
    monkeypatch.setattr(build, "find_cxx", lambda: ["c++"])
    assert build.build(tmp_path, tmp_path)["cpu"]["why_not"] == "ninja not found: pip install ninja"


@pytest.mark.parametrize(("name", "part"), [("MEKERNELS_NATIVE", "cpu"), ("MEKERNELS_CUDA", "cuda")])
def test_switches(monkeypatch, tmp_path, name, part):
    hide(monkeypatch, "c++", "g++", "clang++", "nvcc")
    monkeypatch.setenv(name, "0")
    assert build.build(tmp_path, tmp_path)[part]["why_not"] == f"switched off by {name}=0"
    monkeypatch.setenv(name, "1")
    with pytest.raises(build.BuildError, match=f"{name}=1, but the {part} library was not built: no C"):
        build.build(tmp_path, tmp_path)
    assert not report_of(tmp_path)[part]["built"]
    monkeypatch.setenv(name, "yes")
    with pytest.raises(build.BuildError, match=f"{name} must be auto, 0 or 1, got 'yes'"):
        build.build(tmp_path, tmp_path)


def test_architectures(monkeypatch, tmp_path):
    assert build.gencode("80;90") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
    ]
    assert build.gencode("90a, 100")[1] == "arch=compute_90a,code=sm_90a"
    for wrong in ("", "hopper", "8.0"):
        with pytest.raises(build.BuildError, match="MEKERNELS_CUDA_ARCHS"):
            build.gencode(wrong)


def test_the_command_line(monkeypatch, tmp_path, capsys):
    made = {"cpu": {"built": True}}
    monkeypatch.setattr(command, "build", lambda **options: made)
    assert command.main([]) == 0
    made["cpu"]["built"] = False
    assert command.main([]) == 1

    def refuse(**options):
        raise build.BuildError("MEKERNELS_CUDA=1, but")

    monkeypatch.setattr(command, "build", refuse)
    assert command.main(["-v"]) == 1
    assert capsys.readouterr().err == "error: MEKERNELS_CUDA=1, but\n"


def test_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(build.BuildError, match="has no sources: rebuild from a checkout"):
        build.build(tmp_path, tmp_path)


@needs_cxx
@needs_ninja
def test_no_nvcc_is_one_line_and_the_build_is_incremental(monkeypatch, tmp_path, objects, capsys):
    hide(monkeypatch, "nvcc")
    report = build.build(tmp_path, objects)
    assert report["cpu"]["built"]
    assert report["cpu"]["compiler"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "cuda" in line]
    assert len(lines) == 1
    assert lines[0].startswith("mekernels: cuda: not built: nvcc not found")
    Library(str(tmp_path / build.CPU_LIBRARY), CPU).text("mek_cpu_level")

    before = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert len(before) > 5
    build.build(tmp_path, objects)
    assert before == {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}


@needs_cxx
@needs_ninja
def test_a_changed_header_rebuilds_what_reads_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MEKERNELS_CUDA", "0")
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    build.build(tmp_path / "out", tmp_path / "objects")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "objects").glob("*.o")}
    header = copy / "cpu" / "tables.h"
    header.write_text(header.read_text() + "\n// changed\n")
    os.utime(header, ns=(max(before.values()) + 10**9,) * 2)
    build.build(tmp_path / "out", tmp_path / "objects")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "objects").glob("*.o")}
    assert {name for name in before if before[name] != after[name]} == {"align.o", "tables.o"}


@needs_cxx
@needs_ninja
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    broken = script(
        tmp_path, "broken", 'case "$*" in *-c*) echo "cannot compile" >&2; exit 1;; esac; echo 1.2.3'
    )
    monkeypatch.setenv("CXX", broken)
    monkeypatch.setenv("MEKERNELS_CUDA", "0")
    report = build.build(tmp_path / "out", tmp_path / "objects")
    assert not report["cpu"]["built"]
    assert "cannot compile" in report["cpu"]["why_not"]
    monkeypatch.setenv("MEKERNELS_NATIVE", "1")
    with pytest.raises(build.BuildError, match="MEKERNELS_NATIVE=1, but"):
        build.build(tmp_path / "out", tmp_path / "objects")


@needs_cxx
@needs_ninja
def test_an_nvcc_that_fails_leaves_the_cpu_library(monkeypatch, tmp_path, objects):
    monkeypatch.setenv("CUDACXX", script(tmp_path, "nvcc", "echo unsupported host compiler; exit 1"))
    report = build.build(tmp_path / "out", objects)
    assert report["cpu"]["built"]
    assert not report["cuda"]["built"]
    assert "unsupported host compiler" in report["cuda"]["why_not"]
    monkeypatch.setenv("MEKERNELS_CUDA", "1")
    with pytest.raises(build.BuildError, match="MEKERNELS_CUDA=1, but the cuda library was not built"):
        build.build(tmp_path / "out", objects)


@needs_cxx
@needs_ninja
def test_wide_vector_code_stays_in_its_files(monkeypatch, tmp_path, objects):
    """An inline function that both define would let the linker put wide code where any CPU runs it."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    monkeypatch.setenv("MEKERNELS_CUDA", "0")
    report = build.build(tmp_path, objects)
    for level in report["cpu"]["targets"]:
        command = ["nm", "-C", "--defined-only", "--extern-only", str(objects / f"kernels_{level}.o")]
        listed = subprocess.run(command, text=True, capture_output=True, check=True).stdout
        symbols = [line.split()[-1].removeprefix("_") for line in listed.splitlines() if line.strip()]
        assert symbols == [f"mek::kernels_{level}"]


@needs_nvcc
@needs_cxx
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("cuda/*.cu")))
def test_cuda_code_neither_spills_nor_overfills_shared_memory(tmp_path, source):
    nvcc, cxx = build.find_nvcc(), build.find_cxx()
    command = [*nvcc, "-ccbin", cxx[-1], *build.NVCC_FLAGS, *build.gencode("80;90"), "-Xptxas", "-v"]
    command += [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", "-c", str(CSRC / "cuda" / source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", text)
    expected = len(re.findall(r"__global__", (CSRC / "cuda" / source).read_text()))
    assert len(kernels) == 2 * expected, text
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= len(kernels)
    assert all(pair == ("0", "0") for pair in spills), text
    assert all(int(count) <= 227 * 1024 for count in re.findall(r"(\d+) bytes smem", text)), text


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for aarch64")
def test_the_baseline_compiles_for_aarch64(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    monkeypatch.setenv("MEKERNELS_CUDA", "0")
    report = build.build(tmp_path, tmp_path / "objects")
    assert report["cpu"]["built"]
    assert report["cpu"]["targets"] == ["baseline"]


# ---- through pip, without isolation since a test may not download ----


def wheel(tmp_path, monkeypatch):
    for name, least in (("pip", 21), ("setuptools", 77)):  # what pyproject.toml asks for
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"no {name}")
        if int(version.split(".")[0]) < least:
            pytest.skip(f"{name} is {version}, the build needs {least}")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "_native", "*.so")
    for folder in ("csrc", "mekernels", "motionenhancer"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
        else:
            (source / name).write_text(name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "wheels"), str(source)], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "wheels").glob("*.whl")
    return path


@needs_cxx
@needs_ninja
def test_a_wheel_carries_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("MEKERNELS_CUDA", "0")
    path = wheel(tmp_path, monkeypatch)
    assert "-py3-none-" in path.name
    assert not path.name.endswith("-any.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    native = tmp_path / "site" / "mekernels" / "_native"
    assert report_of(native)["cpu"]["built"]
    assert Library(str(native / build.CPU_LIBRARY), CPU).text("mek_cpu_level")


def test_a_wheel_without_any_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    path = wheel(tmp_path, monkeypatch)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        report = json.loads(archive.read("mekernels/_native/build_report.json"))
    assert not any(name.endswith(".so") for name in names)
    assert report["cpu"]["why_not"] == "no C++ compiler found (CXX=/nowhere/c++)"


# ---- the page ----


def test_the_page_lists_every_environment_variable():
    page = (ROOT / "docs" / "building.md").read_text(encoding="utf-8")
    read = re.compile(
        r"""(?:environ(?:\.get|\.setdefault)?[(\[]|getenv\(|switch\()\s*["']([A-Z][A-Z_]+)["']"""
    )
    names = {"CUDA_HOME", "CUDA_PATH"}  # read in a loop
    for folder in ("mekernels", "motionenhancer", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                names |= set(read.findall(path.read_text(encoding="utf-8")))
    assert {"MEKERNELS_CUDA", "MEKERNELS_CPU_LEVEL", "CXX"} <= names
    assert not {name for name in names if f"`{name}`" not in page}
