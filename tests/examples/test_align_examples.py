"""The scripts for other training loops run unchanged, and move the student closer to its priors."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from motionenhancer import extract
from motionenhancer.alignment.aligner import align
from motionenhancer.students import load_student
from motionenhancer.toy.world import build_toy

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("align_*.py"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    build_toy(folder, clips=4, test_clips=1, progress=False)
    return folder


def run(script: str, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [script, str(toy)])
    names = runpy.run_path(str(FOLDER / script))
    found = re.findall(r"step \d+: answer ([\d.]+), alignment ([\d.]+)", capsys.readouterr().out)
    return names, [(float(answer), float(alignment)) for answer, alignment in found]


def test_each_has_at_most_forty_lines() -> None:
    assert SCRIPTS
    for script in SCRIPTS:
        assert len((FOLDER / script).read_text().splitlines()) <= 40, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_folder_each_shows_its_usage(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if script == "align_trl.py":
        pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"examples/{script} FOLDER" in said
    assert "FOLDER is a toy world of `python -m motionenhancer" in said


def test_plain_loop(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    names, terms = run("align_plain_loop.py", toy, monkeypatch, capsys)
    assert len(terms) == 4
    assert terms[-1][0] < terms[0][0]
    assert 0 < terms[-1][1] < terms[0][1]
    assert names["words"].mapped == names["words"].count > 0
    # The first step's alignment, from eager's own maps and without the capture.
    model, _, _ = load_student(toy / "student", attn_implementation="eager")
    rows, video = names["rows"], names["video"]
    with torch.no_grad():
        maps = torch.stack(model(**names["batch"], output_attentions=True).attentions).mean(dim=(0, 2))
    expected = align(
        maps[:, rows[0]][:, :, video.positions],
        names["prior"],
        grid=video.grid,
        row_tokens=names["row_tokens"],
    )
    assert terms[0][1] == pytest.approx(float(expected), abs=2e-6)


def test_accelerate(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    names, terms = run("align_accelerate.py", toy, monkeypatch, capsys)
    assert len(terms) == 8
    assert sum(answer for answer, _ in terms[-2:]) < sum(answer for answer, _ in terms[:2])
    assert sum(alignment for _, alignment in terms[-2:]) < sum(alignment for _, alignment in terms[:2])
    assert names["chosen"].mapped == names["chosen"].words > 0


def test_trl(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    flags = {"teacher": toy / "teacher", "data": toy / "train.jsonl", "video_root": toy / "videos"}
    flags |= {"prior_dir": toy / "priors", "ddim_steps": 1}
    assert extract.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    calls: list[Any] = []

    def recorded(captured: Any, priors: Any, **options: Any) -> torch.Tensor:
        value = align(captured, priors, **options)
        if torch.is_grad_enabled():  # without gradients, the distance without the aligner is measured
            assert value.requires_grad
            calls.append((captured, priors, options, float(value.detach())))
        return value

    monkeypatch.setattr("motionenhancer.alignment.trainer.align", recorded)
    monkeypatch.setattr(sys, "argv", ["align_trl.py", str(toy), str(tmp_path / "out")])
    names = runpy.run_path(str(FOLDER / "align_trl.py"))
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(log) == len(calls) == 4
    assert log[-1]["loss"] < log[0]["loss"]
    assert "8 of 8 samples aligned, " in capsys.readouterr().out
    # The first step, from eager's own maps without TRL; the order of the samples is that of the priors.
    captured, priors, options, value = calls[0]
    texts = {" ".join(m["content"][-1]["text"] for m in row["messages"]): row for row in names["rows"]}
    batch = names["collate"]([texts[prior.prompt] for prior in priors])
    model, _, _ = load_student(toy / "student", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    maps = torch.stack(out.attentions).mean(dim=(0, 2))
    chosen = [
        attention[rows.clamp(min=0)][:, columns.clamp(min=0)] * (rows >= 0)[:, None] * (columns >= 0)
        for attention, rows, columns in zip(maps, captured.rows, captured.columns, strict=True)
    ]
    # In the first step the aligner was still the identity.
    expected = float(align(torch.stack(chosen), priors, **{**options, "aligner": None}))
    assert value == pytest.approx(expected, rel=1e-4)
    assert log[0]["loss_align"] == pytest.approx(expected, rel=1e-4)
    assert log[0]["loss"] == pytest.approx(float(out.loss) + expected, rel=2e-3)
