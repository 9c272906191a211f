"""MotionBench-Train and MotionVid-QA in the form in which they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motionenhancer.data import Sample, SkipLog, prompt_text, read_samples
from motionenhancer.data.motion_sets import CAPTION_QUESTION

CAPTION = {"video_path": "a.mp4", "motion_caption": " The man lifts his arm.\nThen he turns. "}
PAIR = {"question": "What moves?", "video": "a.mp4", "chosen": "A train.", "rejected": "A ship."}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"x")
    return tmp_path


def read(root: Path, rows: list[Any], *, array: bool = False) -> tuple[list[Sample], SkipLog]:
    file, log = root / "data.json", SkipLog(shout=0)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text(json.dumps(rows, indent=2) if array else "\n".join(lines) + "\n")
    return list(read_samples(file, root, log)), log


def talk(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.mark.parametrize("array", [False, True])
def test_captions_of_motionbench(root: Path, array: bool) -> None:
    samples, log = read(root, [CAPTION, CAPTION], array=array)
    caption = "The man lifts his arm.\nThen he turns."
    assert [sample.messages for sample in samples] == [talk(CAPTION_QUESTION, caption)] * 2
    assert [sample.videos for sample in samples] == [(root / "a.mp4",)] * 2
    assert (log.total, dict(log.notes)) == (0, {})
    assert prompt_text(samples[0], "answer")[0] == caption


@pytest.mark.parametrize("array", [False, True])
def test_preferences_of_motionvid_keep_the_chosen_answer(root: Path, array: bool) -> None:
    samples, log = read(root, [PAIR, {**PAIR, "id": "named"}], array=array)
    assert [sample.messages for sample in samples] == [talk("What moves?", "A train.")] * 2
    assert samples[1].id == "named"
    assert (log.total, dict(log.notes)) == (0, {})


def test_questions_with_one_answer_and_with_a_tag_of_their_own(root: Path) -> None:
    plain = {"question": "What moves?", "video": "a.mp4", "answer": "A train."}
    samples, log = read(root, [plain, {**plain, "question": "Look: <video> what moves?"}])
    assert samples[0].messages == talk("What moves?", "A train.")
    parts = [part["type"] for part in samples[1].messages[0]["content"]]
    assert parts == ["text", "video", "text"]
    assert log.total == 0


def test_forms_may_be_mixed_and_conversations_come_first(root: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "That."}]
    both = {"id": "x", "video": "a.mp4", "conversations": turns, "question": "no", "chosen": "no"}
    samples, log = read(root, [CAPTION, both, PAIR])
    assert [prompt_text(sample, "answer")[0].split()[0] for sample in samples] == ["The", "That.", "A"]
    assert sum(log.notes.values()) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**CAPTION, "motion_caption": "  "}, "empty text"),
        ({**CAPTION, "motion_caption": None}, "missing fields"),
        ({**CAPTION, "motion_caption": 3}, "missing fields"),
        ({"motion_caption": "He turns."}, "tag count differs"),
        ({**CAPTION, "video_path": "b.mp4"}, "missing video file"),
        ({**CAPTION, "video_path": 7}, "missing fields"),
        ({**CAPTION, "motion_caption": "A <video> tag."}, "misplaced tag"),
        ({**PAIR, "question": None}, "missing fields"),
        ({**PAIR, "chosen": {"text": "A train."}}, "missing fields"),
        ({**PAIR, "chosen": ""}, "empty text"),
        ({**PAIR, "video": "b.mp4"}, "missing video file"),
        ({"question": "What?", "video": "a.mp4", "rejected": "A ship."}, "missing fields"),
        ("{broken", "invalid json"),
    ],
)
def test_bad_lines_are_reported_by_number(root: Path, row: Any, reason: str) -> None:
    samples, log = read(root, [CAPTION, row, PAIR])
    assert [sample.line for sample in samples] == [1, 3]
    assert [(entry.line, entry.reason) for entry in log.entries] == [(2, reason)]
