"""`python -m motionenhancer`: every command is listed, runs, and has the same options under both names."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import motionenhancer
from motionenhancer.__main__ import COMMANDS, main

ROOT = Path(motionenhancer.__file__).parent


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {
        path.stem for path in ROOT.glob("*.py") if "def main(" in path.read_text() and path.stem != "__main__"
    }
    assert modules | {"toy"} == set(COMMANDS)
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert f"  {name:<10} {what}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    usage, what, *_ = capsys.readouterr().out.split("\n\n")
    given = {"store": "list|verify|prune ", "look": "[RUN] "}.get(name, "")
    assert usage.startswith(f"usage: python -m motionenhancer.{name} {given}[--option value ...], ")
    assert " ".join(what.split()).lower() == f"{COMMANDS[name]}.".lower()


@pytest.mark.parametrize(("name", "value"), [("eval", "--compare A B"), ("look", "--guidance_scale_2 SCALE")])
def test_help_names_the_value_of_a_flag(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"  {value}" in capsys.readouterr().out


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extrct"]) == 2
    assert "no command 'extrct'; did you mean 'extract'?" in capsys.readouterr().err
    assert main(["42"]) == 2
    assert "the commands are toy, extract" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_flag_gets_a_suggestion(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = {"toy": "--clips", "store": "--prior_dir", "look": "--smooth"}.get(name, "--data")
    with pytest.raises(SystemExit) as stop:
        main([name, flag[:-1] + "x" + flag[-1], "1"])
    assert stop.value.code == 2
    assert f"(did you mean {flag!r}?)" in capsys.readouterr().err


def test_the_store_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in ((["verfy"], "got verfy (did you mean 'verify'?)"), ([], "got none")):
        with pytest.raises(SystemExit):
            main(["store", *given, "--prior_dir", str(tmp_path)])
        assert f"give one of list, verify, prune, {said}" in capsys.readouterr().err


def test_exit_codes_pass_through(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    done = subprocess.run(
        [sys.executable, "-m", "motionenhancer", "store", "list", "--prior_dir", missing],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"--prior_dir {missing}: no such folder" in done.stderr


def test_the_console_script_and_the_type_markers_are_installed() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    module, _, name = project["project"]["scripts"]["motionenhancer"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    for package in ("mekernels", "motionenhancer"):
        assert (ROOT.parent / package / "py.typed").is_file()
        assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]
    pages = sorted(
        file.name for file in (ROOT / "report").iterdir() if file.suffix != ".py" and file.is_file()
    )
    assert sorted(project["tool"]["setuptools"]["package-data"]["motionenhancer.report"]) == pages
