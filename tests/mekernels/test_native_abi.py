"""The ctypes table, the header and the libraries agree; wrong calls are refused."""

import ctypes
import re
import subprocess

import pytest
import torch
from native_support import CSRC, aligned_bytes, cuda_on_host, needs_library, register

from mekernels import native
from mekernels.native import build
from mekernels.native import library as native_loader
from mekernels.native.library import (
    ABI_VERSION,
    COMMON,
    CPU,
    CUDA,
    DTYPES,
    STATUS,
    Library,
    NativeError,
    NativeLoadError,
)

HEADER = (CSRC / "include" / "mek.h").read_text(encoding="utf-8")
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)


def declared_type(text):
    """ctypes type of a C declaration."""
    if "*" in text:
        is_text = re.match(r"const char \*", text) is not None
        return ctypes.c_char_p if is_text else ctypes.c_void_p
    return {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}[text.split()[0]]


def declarations():
    """Functions of the header: name to (result, arguments)."""
    found = {}
    for result, name, arguments in re.findall(r"MEK_API ([\w ]+?[ *]+)(mek_\w+)\(([^)]*)\);", CODE):
        parts = [" ".join(part.split()) for part in arguments.split(",")]
        found[name] = (declared_type(result), [declared_type(part) for part in parts if part != "void"])
    return found


def test_the_table_is_the_header():
    assert declarations() == {**COMMON, **CPU, **CUDA}


def test_constants_are_those_of_the_header():
    assert ABI_VERSION == int(re.search(r"MEK_ABI_VERSION (\d+)", CODE).group(1)) == build.abi_version()
    values = dict(re.findall(r"(MEK_[A-Z0-9_]+) = (\d+)", CODE))
    statuses = {
        name: int(number)
        for name, number in values.items()
        if name.removeprefix("MEK_").lower() not in DTYPES
    }
    assert statuses == {name: number for number, name in STATUS.items()}
    assert {f"MEK_{name.upper()}": number for name, number in DTYPES.items()} == {
        name: int(number) for name, number in values.items() if name not in statuses
    }


@needs_library
@pytest.mark.parametrize(("part", "table"), [("cpu", CPU), ("cuda", CUDA)])
def test_the_libraries_export_the_header_and_nothing_else(part, table):
    name = native.build_report()[part]["library"]
    if name is None:
        pytest.skip(f"not built: {native.build_report()[part]['why_not']}")
    try:
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", str(native_loader.FOLDER / name)],
            text=True,
            capture_output=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        pytest.skip("no nm")
    exported = {line.split()[-1] for line in listed.splitlines()}
    assert exported == {*COMMON, *table}


@needs_library
def test_the_library_names_its_statuses():
    library = native_loader.library_for(torch.device("cpu"))
    for number, name in STATUS.items():
        assert library._functions["mek_status_name"](number).decode() == name
    assert library._functions["mek_status_name"](99).decode() == "unknown status"
    assert library.text("mek_compiler")
    assert native.cpu_level() in ("baseline", "avx2", "avx512")


def shared_library(folder, source):
    cxx = build.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler")
    path = folder / "library.so"
    command = [*cxx, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return str(path)


def test_another_abi_version_is_refused(tmp_path):
    path = shared_library(tmp_path, 'extern "C" int mek_abi_version() { return 99; }')
    with pytest.raises(
        NativeLoadError, match=r"abi version 99, this mekernels needs 1: run python -m mekernels"
    ):
        Library(path, CPU)


def test_a_library_that_lacks_a_function_is_refused(tmp_path):
    path = shared_library(tmp_path, f'extern "C" int mek_abi_version() {{ return {ABI_VERSION}; }}')
    with pytest.raises(NativeLoadError, match="mek_last_error"):
        Library(path, CPU)


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(NativeLoadError, match="cannot load"):
        Library(str(tmp_path / "text.so"), CPU)


def test_a_missing_build_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(native_loader, "FOLDER", tmp_path)
    report = native_loader.build_report()
    assert report["cpu"]["why_not"] == "never built: run python -m mekernels.build"
    assert native_loader._load("cpu", CPU) == "not built: never built: run python -m mekernels.build"
    (tmp_path / "build_report.json").write_text('{"cpu": {"built": true, "library": "gone.so"}}')
    assert "cannot load" in native_loader._load("cpu", CPU)


def test_no_library_for_other_devices():
    with pytest.raises(NativeLoadError, match="no native library for device meta"):
        native.motion_scores(*(torch.empty(size, device="meta") for size in [(1, 2, 2, 3), (1,), (1,)]))


# ---- wrong calls: (function, arguments that are right, place and value of the wrong one, message) ----


def good_calls(buffer):
    """Arguments of every CPU function without ``threads``; all pointers to one large buffer."""
    volumes = [2, 1, 2, 3, 2, 3, 4]
    return {
        "mek_motion_scores": [buffer] * 3 + [1, 2, 3] + [buffer] * 3,
        "mek_token_motion_scores": [buffer, 0, 2, 3, 4, buffer],
        "mek_resample_rows": [buffer, *volumes, 1, buffer, buffer],
        "mek_resample_rows_backward": [buffer, buffer, *volumes, 1, buffer],
        "mek_row_l2": [buffer, buffer, 0, None, 2, 3, buffer],
        "mek_row_l2_backward": [buffer, buffer, 0, None, buffer, buffer, 2, 3, buffer],
        "mek_align": [buffer, buffer, 0, None, *volumes, 1, 1, buffer, buffer],
        "mek_align_backward": [buffer, buffer, 2, 3, buffer],
    }


OPTIONAL = {
    ("mek_resample_rows", 10),
    ("mek_row_l2", 3),
    ("mek_row_l2_backward", 3),
    ("mek_align", 3),
    ("mek_align", 14),
}
FLAGS = {("mek_resample_rows", 8), ("mek_resample_rows_backward", 9), ("mek_align", 11), ("mek_align", 12)}


def wrong_arguments(name, arguments, types):
    """Every wrong value of every single argument."""
    for place, (value, kind) in enumerate(zip(arguments, types, strict=False)):
        if (name, place) in FLAGS:
            continue
        if kind is ctypes.c_void_p:
            if (name, place) not in OPTIONAL:
                yield place, 0, "null"
            if value is not None:
                yield place, value + 1, "aligned"
        elif kind is ctypes.c_int64:
            for wrong in (0, -1, 2**31 + 1, 2**63 - 1, -(2**63)):
                yield place, wrong, "must be from 1 to|elements"
        else:
            yield place, 3, "MEK_FLOAT32"
            yield place, -1, "MEK_FLOAT32"


@needs_library
@pytest.mark.parametrize("name", sorted(good_calls(0)))
def test_the_cpu_library_refuses_every_wrong_argument(name):
    library = native_loader.library_for(torch.device("cpu"))
    memory = torch.zeros(4096)
    arguments = good_calls(memory.data_ptr())[name]
    library.call(name, *arguments, 1)
    tried = 0
    for place, wrong, message in wrong_arguments(name, arguments, CPU[name][1]):
        spoiled = [*arguments[:place], wrong, *arguments[place + 1 :], 1]
        with pytest.raises(ValueError, match=message) as caught:
            library.call(name, *spoiled)
        assert str(caught.value).startswith(f"{name}: ")
        tried += 1
    assert tried > len(arguments) / 2


@pytest.mark.parametrize("name", sorted(good_calls(0)))
def test_the_cuda_library_refuses_every_wrong_argument(name):
    """It also refuses memory of the host or another device, invalid devices, and unfit workspace."""
    library, controls = cuda_on_host()
    memory, elsewhere, workspace = torch.zeros(4096), torch.zeros(4096), aligned_bytes(1 << 16)
    name_cuda = name.replace("mek_", "mek_cuda_")
    arguments = good_calls(memory.data_ptr())[name]
    sized = f"{name_cuda}_workspace" in CUDA
    tail = ([workspace.data_ptr(), workspace.numel()] if sized else []) + [0, None]
    controls.cuda_on_host_clear()
    register(controls, [memory, workspace])
    library.call(name_cuda, *arguments, *tail)

    for place, wrong, message in wrong_arguments(name, arguments, CUDA[name_cuda][1]):
        spoiled = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises(ValueError, match=message) as caught:
            library.call(name_cuda, *spoiled, *tail)
        assert str(caught.value).startswith(f"{name_cuda}: ")
    for device in (-1, 1, 2):
        with pytest.raises(ValueError, match="device"):
            library.call(name_cuda, *arguments, *tail[:-2], device, None)
    pointers = [place for place, value in enumerate(arguments) if value == memory.data_ptr()]
    for place in pointers:
        spoiled = [*arguments[:place], elsewhere.data_ptr(), *arguments[place + 1 :]]
        with pytest.raises(ValueError, match="is host memory, it must be memory of device 0"):
            library.call(name_cuda, *spoiled, *tail)
    register(controls, [elsewhere], device=1)
    for place in pointers:
        spoiled = [*arguments[:place], elsewhere.data_ptr(), *arguments[place + 1 :]]
        with pytest.raises(ValueError, match="is memory of device 1, it must be of device 0"):
            library.call(name_cuda, *spoiled, *tail)
    if sized:
        address, count = tail[:2]
        for wrong, message in [
            ([0, count], "workspace is a null pointer"),
            ([address + 64, count], "aligned to 256 bytes"),
            ([address, 7], "workspace_bytes is 7, it must be at least"),
            ([address, -1], "workspace_bytes is -1"),
            ([elsewhere.data_ptr() // 256 * 256 + 256, count], "workspace is memory of device 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                library.call(name_cuda, *arguments, *wrong, 0, None)


@needs_library
def test_an_unknown_vector_level_is_refused():
    library = native_loader.library_for(torch.device("cpu"))
    before = native.cpu_level()
    with pytest.raises(NativeError, match='name is "avx1024"'):
        library.call("mek_cpu_set_level", b"avx1024")
    assert native.cpu_level() == before


@needs_library
def test_an_unknown_vector_level_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MEKERNELS_CPU_LEVEL", "avx1024")
    with pytest.raises(ValueError, match=r"MEKERNELS_CPU_LEVEL must be auto, or baseline.*, got 'avx1024'"):
        native_loader._cpu.__wrapped__()


@needs_library
def test_messages_belong_to_the_thread():
    from concurrent.futures import ThreadPoolExecutor

    library = native_loader.library_for(torch.device("cpu"))
    with pytest.raises(ValueError, match="rows is 0"):
        library.call("mek_align_backward", 0, 0, 0, 1, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(library.text, "mek_last_error").result() == ""
    assert "rows is 0" in library.text("mek_last_error")
