"""The examples in docstrings run, but for those that need a model from disk and say so themselves."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("motionenhancer", "studies")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_the_examples_are_found() -> None:
    assert {"motionenhancer.alignment.weight", "motionenhancer.teachers", "studies.toy.mistakes"} <= set(
        MODULES
    )


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("motionenhancer", "mekernels")):
            raise
        pytest.skip(f"{error.name} is not installed")
    examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
    assert examples
    if all(example.options.get(doctest.SKIP) for example in examples):
        pytest.skip("its examples need a model on disk")
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
