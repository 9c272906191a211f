"""The workflows and the image name what is there."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSIONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: \d\.\d+$", c)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_is_there_on_every_version(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    tried = [job["strategy"]["matrix"] for job in jobs.values() if "strategy" in job]
    assert [matrix["python"] for matrix in tried if "python" in matrix] == [VERSIONS]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = [part for command in commands for part in command.split() if part.startswith((".ci/", "tests/"))]
    assert all((ROOT / name).is_file() for name in named), named
    assert all(os.access(ROOT / name, os.X_OK) for name in named if name.startswith(".ci/"))


def test_the_image_installs_extras_that_exist_and_starts_a_command_that_does() -> None:
    text = (ROOT / "Dockerfile").read_text()
    extras = re.findall(r"motionenhancer\[([\w,]+)\]", text)
    assert extras
    assert set(extras[0].split(",")) <= set(PROJECT["optional-dependencies"])
    (entry,) = re.findall(r'ENTRYPOINT \["(\w+)"\]', text)
    assert entry in PROJECT["scripts"]
