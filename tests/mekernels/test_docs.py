"""Every public name has a docstring whose example runs."""

import doctest
import importlib
import pkgutil
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
    "name", [name for name in mekernels.__all__ if name not in ("reference", "BackendError")]
)
def test_public_names_explain_themselves(name):
    text = getattr(mekernels, name).__doc__
    assert "Example:" in text
    assert ">>> " in text


def test_reference_has_every_function():
    for name in set(mekernels.__all__) - {
        "BackendError",
        "MotionScores",
        "MotionStatistics",
        "VideoTokens",
        "reference",
        "use_backend",
    }:
        assert callable(getattr(mekernels.reference, name))
