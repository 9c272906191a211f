"""Every public name has a docstring whose example runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mekernels

MODULES = [
    module.name
    for module in pkgutil.walk_packages(mekernels.__path__, "mekernels.")
    if ">>> " in Path(module.module_finder.find_spec(module.name).origin).read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    "name",
    [name for name in mekernels.__all__ if name not in ("reference", "BackendError")],
)
def test_public_names_explain_themselves(name):
    text = getattr(mekernels, name).__doc__
    assert "Example:" in text
    assert ">>> " in text


def test_reference_has_every_function():
    for name in set(mekernels.__all__) - {
        "BackendError",
        "HeadStatistics",
        "MotionScores",
        "MotionStatistics",
        "VideoTokens",
        "reference",
        "use_backend",
    }:
        assert callable(getattr(mekernels.reference, name))


#: An environment variable where it is read or written, in Python, C++ and shell.
VARIABLES = re.compile(
    r'(?:environ(?:\.\w+\(|\[)|getenv\()"([A-Z][A-Z0-9_]+)"'
    r'|"([A-Z][A-Z0-9_]+)" (?:not )?in os\.environ'
    r"|\$\{([A-Z][A-Z0-9_]+):[-+]"
)
#: The same by way of a constant or a loop, in a file that reads the environment.
NAMED_ELSEWHERE = re.compile(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]+)"')


def environment_variables():
    """Name -> a file of the sources that reads or writes it."""
    root = Path(__file__).parents[2]
    found = {}
    for folder in ("csrc", "mekernels", "motionenhancer", "scripts", "setup.py"):
        for file in [root / folder, *(root / folder).rglob("*")]:
            if file.is_file() and file.suffix in (".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh"):
                text = file.read_text(encoding="utf-8")
                names = [name for groups in VARIABLES.findall(text) for name in groups if name]
                if "environ" in text and file.suffix == ".py":
                    names += NAMED_ELSEWHERE.findall(text)
                found |= dict.fromkeys(names, file.name)
    return found


def test_the_page_of_environment_variables_is_whole():
    page = (Path(__file__).parents[2] / "docs" / "building.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)}
    found = environment_variables()
    assert {"MEKERNELS_CPU_LEVEL", "CXX", "FUZZ_SEED", "ACCELERATE_USE_DEEPSPEED"} <= found.keys()
    assert found.keys() <= listed, {name: found[name] for name in found.keys() - listed}
    assert listed <= found.keys()


def test_every_page_links_to_the_index_and_is_linked_from_it():
    folder = Path(__file__).parents[2] / "docs"
    index = (folder / "index.md").read_text(encoding="utf-8")
    for page in folder.glob("*.md"):
        if page.name != "index.md":
            assert f"]({page.name})" in index, f"index.md has no link to {page.name}"
            assert "](index.md)" in page.read_text(encoding="utf-8"), f"{page.name} has no link to index.md"
