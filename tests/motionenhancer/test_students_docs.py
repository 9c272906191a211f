"""The examples of docs/students.md, run in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "students.md"


def test_examples_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    world.link(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    printed = capsys.readouterr().out
    assert "words found" in printed
    assert printed.count("% on the video") == len(scope["answer"]) == scope["generated"].attention.shape[1]
    attention = scope["captured"].attention
    assert attention.shape == (1, scope["rows"].shape[1], scope["video"].positions.numel())
    assert float(scope["loss_align"].detach()) > 0
