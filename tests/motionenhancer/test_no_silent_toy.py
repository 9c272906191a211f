"""A command that names anything of its own asks for the rest by name; one that names nothing runs the toy."""

from __future__ import annotations

import importlib
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World
from train_support import FAST

PARTS = {"train": ("student", "teacher", "data"), "extract": ("teacher", "data"), "eval": ("student", "data")}
CASES = [
    (command, given)
    for command, parts in PARTS.items()
    for count in range(1, len(parts))
    for given in combinations(parts, count)
]


@pytest.mark.parametrize(("command", "given"), CASES)
def test_what_is_missing_is_asked_for_by_name(
    command: str,
    given: tuple[str, ...],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [part for name in given for part in (f"--{name}", str(getattr(world, name)))]
    assert importlib.import_module(f"motionenhancer.{command}").main(flags) == 2
    said = capsys.readouterr().err.strip()
    missing = [name for name in PARTS[command] if name not in given]
    asked = said.removeprefix("error: ").partition(" must be given with ")[0]
    assert sorted(asked.split(" and ")) == sorted(f"--{name}" for name in missing)
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_plain_training_needs_no_teacher_and_the_plan_names_what_is_used(
    world: World, tmp_path: Path, capsys: Any
) -> None:
    from motionenhancer import train

    plain = world.flags(teacher=None, alignment_weight=0, output_dir=tmp_path / "a", dry_run=True)
    assert train.main([*plain, "--use_cpu", "true"]) == 0
    said = capsys.readouterr().out
    assert f"student {world.student}" in said
    assert f"data {world.data}, 8 samples" in said
    assert "teacher" not in said
    aligned = world.flags(output_dir=tmp_path / "b", dry_run=True, **FAST, prior_dir=tmp_path / "priors")
    assert train.main(aligned) == 0
    said = capsys.readouterr().out
    assert f"teacher {world.teacher}\npriors {tmp_path / 'priors'}" in said
