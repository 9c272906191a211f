"""What the toy's student is shown of a clip, and how its answers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from motionenhancer.data import read_frames
from motionenhancer.students import load_student
from motionenhancer.toy.accuracy import FRAMES as SHOWN
from motionenhancer.toy.accuracy import accuracy, accuracy_table, samples_of, shown_clip
from motionenhancer.toy.render import FRAMES
from motionenhancer.toy.world import ToyFolder, write_world
from motionenhancer.train import TOY_RECIPE


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyFolder:
    return write_world(tmp_path_factory.mktemp("toy"), clips=1, test_clips=6, progress=False)


def test_controls_hide_motion(toy: ToyFolder) -> None:
    path = toy.videos / "train-00000.mp4"
    whole, video = read_frames(path).frames, shown_clip(path, "video", 0)
    assert len(whole) == FRAMES
    middle = shown_clip(path, "middle", 0)
    assert (middle.frames == whole[FRAMES // 2]).all()
    assert middle.frames.shape == video.frames.shape
    mixed = shown_clip(path, "shuffled", 0).frames
    assert sorted(f.tobytes() for f in mixed) == sorted(f.tobytes() for f in video.frames)
    assert (mixed != video.frames).any()
    assert (mixed != shown_clip(path, "shuffled", 1).frames).any()


def test_accuracy_counts_answers_that_agree_word_for_word(
    toy: ToyFolder, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six questions, two answers are right, and the third lacks only the full stop."""
    true = [s.messages[1]["content"][0]["text"] for s in samples_of(toy.test, toy.videos)]
    given = [f" {true[0]} ", true[1], true[2].rstrip("."), "", "", ""]
    monkeypatch.setattr("motionenhancer.evaluation.generate.generate_answers", lambda *_, **__: given)
    model, processor, family = load_student(student_dir, dtype=torch.float32)
    found = accuracy(model, processor, family, toy.root)
    assert found["tasks"] == {"MR": 100, "LM": 100, "CM": 0, "MO": 0, "AO": 0, "RC": 0}
    assert found["overall"] == pytest.approx(100 / 3)
    assert found["average"] == pytest.approx(100 / 3)
    assert accuracy_table({"now": found}).splitlines()[1].split() == [
        *("now", "33.3%", "100.0%", "100.0%", "0.0%", "0.0%", "0.0%", "0.0%")
    ]


def test_the_table_has_the_tasks_that_all_have() -> None:
    one = {"overall": 50.0, "tasks": {"MR": 50.0}}
    assert accuracy_table({"before": one, "plain": one}).splitlines()[0].split() == ["Overall", "MR"]


def test_the_student_is_tested_on_as_many_frames_as_it_is_trained_on() -> None:
    assert yaml.safe_load(TOY_RECIPE.read_text("utf-8"))["num_frames"] == SHOWN
