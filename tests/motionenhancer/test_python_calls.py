"""The commands as functions: the same flags, the same results, errors as exceptions."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World
from train_support import FAST, report_of, shared_priors, weights_of

from motionenhancer.eval import evaluate
from motionenhancer.extract import extract
from motionenhancer.train import train


def paths(world: World) -> dict[str, Any]:
    return {"teacher": world.teacher, "video_root": world.videos, "prior_dir": shared_priors(world)}


def test_a_data_set_in_memory_is_extracted_trained_on_and_evaluated(world: World, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    table = datasets.Dataset.from_list(rows)
    made = extract(data=table, ddim_steps=1, **paths(world))
    assert (made["status"], made["samples"]) == ("finished", len(rows))
    given = {**paths(world), **FAST, "student": world.student, "prior_source": "store", "max_steps": 1}
    # TensorBoard's text holds the names of both.
    tracked = {"report_to": "tensorboard"} if importlib.util.find_spec("tensorboard") else {}
    report = train(
        data=table,
        eval_data=table,
        eval_video_root=world.videos,
        output_dir=tmp_path / "a",
        **given,
        **tracked,
    )
    assert report_of(report.folder)["status"] == "finished"
    assert any("eval_loss_align" in entry for entry in report.content["training"]["log"])
    train(data=world.data, output_dir=tmp_path / "b", **given)
    ours, theirs = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all((ours[name] == value).all() for name, value in theirs.items())
    asked = {"video_root": world.videos, "output_dir": tmp_path / "scores", "limit": 2}
    scores = evaluate(student=report.folder, data=table, **asked)
    assert scores["count"] == 2
    assert scores == json.loads((tmp_path / "scores" / "scores.json").read_text())
    compared = evaluate(compare=[tmp_path / "scores", tmp_path / "scores"])
    assert compared["questions"] == 2


def test_the_page_s_calls_run_and_a_report_shows_itself_briefly(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    world.link(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/training.md", "exec"), scope)
    made, shown, overall = capsys.readouterr().out.splitlines()[-3:]
    last = [entry for entry in report_of(tmp_path / "runs/python")["training"]["log"] if "loss" in entry][-1]
    losses = ", ".join(
        f"{name}={last[name]:.4g}" for name in ("loss", "loss_ar", "loss_align", "loss_align_raw")
    )
    assert (made, shown) == ("8", f"RunReport('runs/python', status='finished', {losses})")
    scores = json.loads((tmp_path / "scores/python/scores.json").read_text())
    assert overall == str(scores["overall"])
    again = scope["given"] | {"student": "toy/student", "learning_rate": 1e-3, "max_steps": 20}
    assert train(**again, output_dir="runs/python").status == "finished"


@pytest.mark.parametrize("call", [train, extract, evaluate])
def test_what_is_wrong_is_an_exception_that_names_it(call: Any, world: World) -> None:
    with pytest.raises(ValueError, match=r"no option 'video_rot' \(did you mean 'video_root'\?\)"):
        call(video_rot=world.videos)
    with pytest.raises(ValueError, match="--limit must be at least 1, got 0"):
        call(data=world.data, limit=0)
    with pytest.raises(ValueError, match=r"invalid int value: 'many'|--limit"):
        call(data=world.data, limit="many")
