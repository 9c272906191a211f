"""Makes ``studies`` importable, and leaves out the folders whose packages are missing here, by name."""

import importlib.util
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Last in the path, so that it hides nothing.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# `pytest -n N` runs N processes at once, so the threads of one would take the cores of the others. OpenMP
# reads this when torch is imported, and the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MISSING = [name for name in ("av", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
NEED_ALL = ["examples", "motionenhancer", "studies"]
collect_ignore = NEED_ALL if MISSING else []


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of files under `--dist loadfile`, which puts those of few, slow tests last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape printed text that utf-8 cannot hold, because the processes of `pytest -n N` exchange utf-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not collected, and why."""
    if MISSING:
        folders = ", ".join(f"tests/{name}" for name in NEED_ALL)
        terminalreporter.write_line(f"not collected: {folders}; not installed: {', '.join(MISSING)}")
