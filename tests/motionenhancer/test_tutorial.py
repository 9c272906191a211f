"""The commands of docs/tutorial.md run, with fewer clips and steps, and print what the page shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from motionenhancer import __main__

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALL = {"toy": {"--clips": "4", "--test_clips": "6"}, "train": {"--max_steps": "1"}}


def masked(text: str) -> set[str]:
    """The lines of a text, without the lengths of gaps and the values of numbers."""
    return {" ".join(re.sub(r"[-+]?\d[\d.]*", "N", line).split()) for line in text.splitlines()}


def test_its_commands_and_its_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"```(python)?\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = "".join(text.replace("\\\n", " ") for _, text in blocks if text.startswith("python -m"))
    for line in commands.splitlines():
        _, _, module, *given = shlex.split(line)
        command = module.removeprefix("motionenhancer.")
        for name, value in SMALL.get(command, {}).items():
            if name in given:
                given[given.index(name) + 1] = value
            else:
                given += [name, value]
        assert __main__.main([command, *given]) == 0, line
    (code,) = [text for language, text in blocks if language]
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/tutorial.md", "exec"), scope)
    printed = capsys.readouterr().out
    shown = "".join(text for language, text in blocks if not language and not text.startswith("python -m"))
    assert masked(shown.replace("...\n", "")) <= masked(printed)
    # The question of the page is one of the test's, and its answer is the one that was scored.
    asked = scope["asked"][1]["text"]
    rows = [json.loads(row) for row in Path("toy/test.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["conversations"][0]["value"].endswith(asked)]
    results = map(json.loads, Path("scores/aligned/results.jsonl").read_text().splitlines())
    assert printed.splitlines()[-1] in [found["output"] for found in results if found["id"] == row["id"]]
