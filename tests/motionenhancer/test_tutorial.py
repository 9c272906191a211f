"""The commands of docs/tutorial.md run, with fewer clips and steps, and print what the page shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tiny_world import World

from motionenhancer import __main__
from motionenhancer.data.encode import encode_video

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
#: Language and text of each block.
BLOCKS: list[tuple[str, str]] = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
SMALL = {"toy": {"--clips": "4", "--test_clips": "6"}, "train": {"--max_steps": "1"}}


def masked(text: str) -> set[str]:
    """The lines of a text, without the lengths of gaps and the values of numbers."""
    number = r"[-+]?\d(?:[\d.]|,\d{3})*(?:e-\d+)?"
    return {" ".join(re.sub(number, "N", line).split()) for line in text.splitlines()}


def type_commands(blocks: list[tuple[str, str]], other: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run the commands of the blocks; `other` replaces parts of them."""
    commands = "".join(text.replace("\\\n", " ") for _, text in blocks if text.startswith("python -m"))
    for line in commands.splitlines():
        _, _, module, *given = [other.get(part, part) for part in shlex.split(line)]
        command = module.removeprefix("motionenhancer.")
        for name, value in SMALL.get(command, {}).items():
            if name in given:
                given[given.index(name) + 1] = value
            else:
                given += [name, value]
        assert __main__.main([command, *given]) == 0, line


def test_its_commands_and_its_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    type_commands(BLOCKS)
    (code,) = [text for language, text in BLOCKS if language == "python"]
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/tutorial.md", "exec"), scope)
    printed = capsys.readouterr().out
    # The block after the code is the answer. After one step, the student gives another one.
    (_, answer) = BLOCKS[[language for language, _ in BLOCKS].index("python") + 1]
    outputs = [text for language, text in BLOCKS if not language and not text.startswith("python -m")]
    shown = "".join(text for text in outputs if text != answer)
    assert masked(shown.replace("...\n", "")) <= masked(printed)
    # The question of the page is one of the test's, and its answer is the one that was scored.
    asked = scope["asked"][1]["text"]
    rows = [json.loads(row) for row in Path("toy/test.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if f"toy/videos/{row['video']}" in code]
    assert row["conversations"][0]["value"].endswith(asked)
    results = map(json.loads, Path("scores/aligned/results.jsonl").read_text().splitlines())
    (scored,) = [found["output"] for found in results if found["id"] == row["id"]]
    assert scored.startswith(printed.split("\n")[-2]), "the page's answer has fewer tokens"


@pytest.mark.parametrize("real", [False, True], ids=["made", "real"])
def test_it_works_with_clips_of_ones_own(
    real: bool,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Steps 2 to 6 with the page's row, which has no id, and clips of other sizes than the toy's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    world.link(tmp_path / "toy")
    (row,) = [json.loads(text) for language, text in BLOCKS if language == "json"]
    names = [row["video"], "bigbuckbunny.mp4"]
    (tmp_path / "clips").mkdir()
    for i, name in enumerate(names):
        if real:
            shutil.copy(request.getfixturevalue("real_clips")[Path(name).stem], tmp_path / "clips" / name)
        else:
            noise = np.random.default_rng(i).integers(0, 256, (20 + i, 90, 160, 3), dtype=np.uint8)
            encode_video(tmp_path / "clips" / name, noise, fps=25)
    rows = [json.dumps({**row, "video": name}) for name in names]
    Path("mine.jsonl").write_text("\n".join(rows))
    mine = {"toy/train.jsonl": "mine.jsonl", "toy/test.jsonl": "mine.jsonl", "toy/videos": "clips"}
    type_commands([block for block in BLOCKS if "motionenhancer.toy " not in block[1]], mine)
    printed = capsys.readouterr().out
    assert "2 samples have their prior in priors (2 made now)" in printed
    assert re.search(r"[1-9]\d* of [1-9]\d* samples aligned, ", printed)
    assert "McNemar" in printed
    results = map(json.loads, Path("scores/aligned/results.jsonl").read_text().splitlines())
    assert [found["id"] for found in results] == ["line-1", "line-2"]
