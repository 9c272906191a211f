"""The studies run from a checkout as the docs say, are whole in a source archive, and are not installed."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("toy.md", "toy_study.md")
PAGE = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)
LINES = re.findall(r"^python -m (studies\..+)$", PAGE.replace("\\\n", ""), flags=re.MULTILINE)
COMMANDS = [shlex.split(line) for line in LINES]


def test_the_page_names_every_command() -> None:
    programs = {path for path in (ROOT / "studies").rglob("*.py") if "__main__" in path.read_text("utf-8")}
    assert {command[0] for command in COMMANDS} == {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in programs
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_understood(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *flags = command
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main([*flags, "--help"])  # what stands before --help is checked
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    assert said.out.startswith(f"usage: python -m {name} ")
    known = set(re.findall(r"--\w+", said.out))
    assert {flag for flag in flags if flag.startswith("--")} <= known


def test_the_page_names_files_that_are_there() -> None:
    named = re.findall(r"`((?:benchmarks|motionenhancer|studies)/[^`\s]*)`", PAGE)
    assert "studies/toy/arms.py" in named
    for path in named:
        assert (ROOT / path).exists(), path


def test_a_command_runs_in_the_root_of_a_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "studies.toy.study", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m studies.toy.study ")


def test_a_source_archive_carries_the_studies_and_an_installation_does_not(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")  # what pyproject.toml asks for
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.egg-info")
    carried = set((made / "SOURCES.txt").read_text("utf-8").splitlines())
    programs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "studies").rglob("*.py")}
    assert programs
    assert programs <= carried
    assert set((made / "top_level.txt").read_text("utf-8").split()) == {"mekernels", "motionenhancer"}
