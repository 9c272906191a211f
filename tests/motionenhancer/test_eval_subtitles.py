"""Subtitles at the times of a clip's frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motionenhancer import eval as evaluate
from motionenhancer.data.question import Question
from motionenhancer.data.sampling import Frames
from motionenhancer.evaluation import generate
from motionenhancer.evaluation.subtitles import (
    read_subtitles,
    subtitles_digest,
    with_subtitles,
)
from motionenhancer.toy.world import write_world

SRT = (
    '\ufeff1\r\n00:00:00,000 --> 00:00:01,500\r\n<font color="white" size=".72c">Hi guys,</font>\r\n\r\n'
    "2\r\n00:00:01,500 --> 00:00:02,900\r\nI show you\r\nhow\r\n\r\n"
    "3\r\n00:00:02,900 --> 00:00:03,000\r\n<i></i>\r\n\r\n"
    "4\r\n01:00:03.250 --> 01:00:04,000\r\nthe end\r\n"
)


def write(folder: Path, text: str = SRT) -> Path:
    file = folder / "clip.srt"
    file.write_bytes(text.encode())
    return file


def test_an_srt_file(tmp_path: Path) -> None:
    assert read_subtitles(write(tmp_path)) == [
        (0, 1.5, "Hi guys,"),
        (1.5, 2.9, "I show you how"),
        (3603.25, 3604, "the end"),
    ]
    file = write(tmp_path, "1\n00:00:00,000 --> 00:00:01,000\na\n\nb\n\n2\n00:00:01,000 --> 00:00:02,000\nc")
    assert read_subtitles(file) == [(0, 1, "a b"), (1, 2, "c")]
    assert read_subtitles(write(tmp_path, " \n")) == []
    with pytest.raises(ValueError, match="not an srt file, as it begins with 'WEBVTT'"):
        read_subtitles(write(tmp_path, "WEBVTT\n\n00:01.000 --> 00:02.000\na"))


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ([0.0, 1.0], "Hi guys,"),
        ([1.5], "I show you how"),
        ([0.0, 2.0], "Hi guys,\nI show you how"),
        ([2.95, 3603.0], "No subtitles available"),
    ],
)
def test_only_the_subtitles_of_the_frames(times: list[float], shown: str, tmp_path: Path) -> None:
    said = with_subtitles("Select {it}.", write(tmp_path), times)
    assert said == f"This video's subtitles are listed below:\n{shown}\nSelect {{it}}."


def test_a_clip_without_subtitles(tmp_path: Path) -> None:
    said = with_subtitles("Select.", tmp_path / "none.srt", [0.0])
    assert said == "This video's subtitles are listed below:\nNo subtitles available\nSelect."


def test_a_changed_file_is_another_run_and_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path), tmp_path / "none.srt"]
    before = subtitles_digest(files)
    write(tmp_path, SRT.replace("guys", "all"))
    assert subtitles_digest(files) != before
    with pytest.raises(ValueError, match=r"must hold srt files such as none.srt; it has none"):
        subtitles_digest(files[1:])


def test_a_batch_is_asked_with_them(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", clips=1, test_clips=1, frames=16, progress=False)
    clip = world.videos / "test-00000.mp4"
    prompts: list[str] = []
    question = Question("q", "clip", "Which?", "A", ("short",))
    asked = [generate.Asked(question, "Which?", clip, file) for file in (None, write(tmp_path))]
    broken = generate.Asked(question, "Which?", clip, tmp_path / "broken.srt")
    (tmp_path / "broken.srt").write_text("no subtitles")
    frames: Any = Frames(num_frames=None, fps=1.0, min_frames=1, max_frames=8, max_pixels=None)
    rows, _ = generate.encode_batch(
        [*asked, broken], lambda id, prompt, *a, **k: prompts.append(prompt), frames
    )
    assert prompts == ["Which?", "This video's subtitles are listed below:\nHi guys,\nWhich?"]
    assert "not an srt file" in rows[2]["skipped"]


@pytest.mark.parametrize("flags", [["--benchmark", "favor"], ["--benchmark", "videomme", "--lmms_eval", "x"]])
def test_other_benchmarks_and_harnesses_have_none(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([]))
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--data", str(data), "--subtitles", str(tmp_path)])
    assert (
        "--subtitles needs --benchmark videomme and does not go with --lmms_eval" in capsys.readouterr().err
    )
