"""The commands as functions: the same flags, the same results, errors as exceptions."""

from __future__ import annotations

import json
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
    report = train(
        data=table, eval_data=table, eval_video_root=world.videos, output_dir=tmp_path / "a", **given
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


@pytest.mark.parametrize("call", [train, extract, evaluate])
def test_what_is_wrong_is_an_exception_that_names_it(call: Any, world: World) -> None:
    with pytest.raises(ValueError, match=r"no option 'video_rot' \(did you mean 'video_root'\?\)"):
        call(video_rot=world.videos)
    with pytest.raises(ValueError, match="--limit must be at least 1, got 0"):
        call(data=world.data, limit=0)
    with pytest.raises(ValueError, match=r"invalid int value: 'many'|--limit"):
        call(data=world.data, limit="many")
