"""Options, the sampler, and what is written beside pytest-benchmark's own figures."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import pytest
import torch
from measure import device
from measure.sampler import Sampler

LEFT_OUT = ("refused", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("motion benchmarks")
    group.addoption(
        "--size",
        choices=("auto", "tiny", "scaled", "real"),
        default="auto",
        help="shapes: real models' (auto on a GPU), scaled down for two cores (auto on a CPU), or tiny",
    )
    group.addoption("--seconds", type=float, default=None, help="time to spend on each figure")
    group.addoption(
        "--deadline", type=float, default=540.0, help="begin no figure after so many seconds (%(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = {name: [] for name in LEFT_OUT}
    config.option.benchmark_group_by = "group"
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    torch.backends.cuda.matmul.allow_tf32 = False


_KEY = pytest.StashKey[dict[str, list]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise over ``works(size)`` of the test's module: each entry is (name, case, build, roles)."""
    if "planned" not in metafunc.fixturenames:
        return
    size = metafunc.config.getoption("--size")
    if size == "auto":
        size = "real" if device.on_gpu() else "scaled"
    plans = metafunc.function.plans(size)
    figures = [(plan, role) for plan in plans for role in plan.roles]
    metafunc.parametrize(
        "planned", figures, ids=[f"{plan.case}-{role}".replace(" ", "_") for plan, role in figures]
    )


FIRST = ("teacher_layer", "student_rows", "student_entries", "student", "teacher_step", "scores", "alignment")
"""Order of the files: what matters most is measured before a deadline."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_bench_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device.clock, disable_gc=True))


@pytest.fixture(scope="session")
def sampler(request: pytest.FixtureRequest) -> Sampler:
    seconds = request.config.getoption("--seconds")
    if seconds is None:
        seconds = 0.5 if device.on_gpu() else 1.0
    deadline = time.monotonic() + request.config.getoption("--deadline")
    return Sampler(seconds, deadline, **request.config.stash[_KEY])


@pytest.fixture
def measure(benchmark: Any, sampler: Sampler, planned: Any) -> Any:
    """Builds the planned work, keeping only the last one, and measures the planned role."""
    plan, role = planned
    return lambda: sampler.measure(benchmark, plan.built(), role)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["device"] = device.name()
    machine_info["versions"] = device.versions()
    machine_info["ceilings"] = device.ceilings()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["commit_info"].pop("project", None)
    for entry in output_json["benchmarks"]:
        # These are the test's objects; extra_info says what they are.
        entry["param"] = entry["params"] = None
    output_json.update(config.stash[_KEY])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = getattr(config.option, "benchmark_json", None)
    if path is not None:
        terminalreporter.write_line(f"ratios at a glance: python benchmarks/report.py {path.name}")
    else:
        terminalreporter.write_line(
            "ratios at a glance: add --benchmark-json=FILE, then python benchmarks/report.py FILE"
        )
