"""The benchmarks' files as published, answers made elsewhere, clips on disk, and submissions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motionenhancer.data import SkipLog
from motionenhancer.data.question import video_stem
from motionenhancer.evaluation.answers import append_answers, mend_answers, read_answers, read_predictions
from motionenhancer.evaluation.arguments import EvalArguments
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, load_questions
from motionenhancer.evaluation.videos import VideoFolder
from motionenhancer.students import student_family
from motionenhancer.toy.world import write_world

DATA = Path(__file__).parent / "data_eval"
FILES = {"motionbench": DATA / "video_info.meta.jsonl", "favor": DATA / "video_perspective.json"}


def load(name: str, path: Path | None = None, **options: Any) -> tuple[list[Any], SkipLog]:
    log = SkipLog()
    return load_questions(BENCHMARKS[name], path or FILES[name], log, **options), log


# ---- questions ----


def test_motionbench_file() -> None:
    questions, log = load("motionbench")
    assert [q.id for q in questions] == ["mr_0", "mr_1", "lm_0", "cm_0", "mo_0", "ao_0", "rc_0"]
    assert [q.tasks[0] for q in questions] == ["MR", "MR", "LM", "CM", "MO", "AO", "RC"]
    assert questions[0].answer == "B"
    assert questions[0].text.startswith("What does the circle do?\nA. ")
    assert log.counts == {"no public answer": 2}
    everything, log = load("motionbench", hidden=True)
    assert [q.id for q in everything if q.answer is None] == ["rc_1", "cm_1"]
    assert log.total == 2, "they are left out of the score and counted either way"


def test_favor_file_with_and_without_extensions() -> None:
    questions, log = load("favor")
    assert [q.id for q in questions] == [
        *(f"test-00000#{i}" for i in range(3)),
        *(f"test-0000{v}#{i}" for v in (1, 2) for i in range(2)),
    ]
    assert [q.tasks[0] for q in questions] == ["AS", "HAC", "SAD", "MAD", "CM", "NSM", "AS"]
    assert questions[1].options == ("Jumping", "Walking", "Turning", "Resting")
    assert log.total == 0


def test_only_a_videos_extension_is_dropped() -> None:
    assert [video_stem(n) for n in ("a.mp4", "a.MKV", "a.b", "a_0.5_1.2", "a.mp4.mp4", " a.webm ")] == [
        "a",
        "a",
        "a.b",
        "a_0.5_1.2",
        "a.mp4",
        "a",
    ]


def test_repeated_ids_count_once(tmp_path: Path) -> None:
    lines = FILES["motionbench"].read_text().splitlines()
    double = tmp_path / "double.jsonl"
    double.write_text("\n".join([*lines, lines[0]]))
    questions, log = load("motionbench", double)
    assert len(questions) == 7
    assert log.counts["repeated id"] == 2
    rows = json.loads(FILES["favor"].read_text())
    double.write_text(json.dumps([*rows, {**rows[1], "video_name": "test-00001.mp4"}]))
    questions, log = load("favor", double)
    assert len(questions) == 7
    assert log.counts["repeated id"] == 2


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("motionbench", 3),
        ("motionbench", {"qa": []}),
        ("motionbench", {"video_path": "a"}),
        ("motionbench", {"video_path": "a", "qa": ["x"]}),
        ("motionbench", {"video_path": "a", "qa": [{"question": "Which?", "answer": "A"}]}),
        ("motionbench", {"video_path": "a", "qa": [{"uid": "u", "question": " ", "answer": "A"}]}),
        ("favor", {"video_name": "a"}),
        ("favor", {"video_name": "", "questions": []}),
        ("favor", {"video_name": "a", "questions": [7]}),
        ("favor", {"video_name": "a", "questions": [{"question": "q", "options": ["a"]}]}),
        (
            "favor",
            {"video_name": "a", "questions": [{"question": "q", "options": "ab", "correct_answer": "a"}]},
        ),
        ("toy", {"id": "a", "video": "b", "conversations": [{"value": "x"}]}),
    ],
)
def test_broken_rows_are_counted_and_left_out(tmp_path: Path, name: str, row: Any) -> None:
    good: dict[str, Any] = {
        "motionbench": {"key": "k", "qa": [{"uid": 7, "question": "Which?", "answer": "A"}]},
        "favor": {
            "video_name": "v",
            "questions": [{"question": "q", "options": ["a"], "correct_answer": "a"}],
        },
        "toy": {
            "id": "t-still",
            "video": "v.mp4",
            "conversations": [{"value": "<video>\nq"}, {"value": "a"}],
        },
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n{half\n" + json.dumps(good[name]) + "\n")
    questions, log = load(name, file)
    assert len(questions) == 1
    assert questions[0].id == {"motionbench": "7", "favor": "v#0", "toy": "t-still"}[name]
    assert log.counts == {"invalid json": 1, "missing fields": 1}
    if name != "toy":
        assert questions[0].tasks == ("unknown",), "a missing task is a task of its own"


HALF = "half \ud800"


@pytest.mark.parametrize(
    "change", [{"question_type": HALF}, {"qa": [{"uid": HALF, "question": "q", "answer": "A"}]}, {HALF: 1}]
)
def test_half_a_surrogate_pair_costs_its_row_only(tmp_path: Path, change: dict[str, Any]) -> None:
    """Half a surrogate pair is valid json, but cannot be written or tokenised."""
    good = {"key": "k", "qa": [{"uid": 7, "question": "Which?", "answer": "A"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**good, **change}) + "\n" + json.dumps(good) + "\n")
    questions, log = load("motionbench", file)
    assert [question.id for question in questions] == ["7"]
    assert log.counts == {"invalid text": 1}


@pytest.mark.parametrize("answer", ["NA", "na", "", None, " NA "])
def test_hidden_answers(tmp_path: Path, answer: str | None) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"video_path": "a", "question_type": ["Action Order", "camera motion"]}
    file.write_text(json.dumps({**row, "qa": [{"uid": "u", "question": "Which?", "answer": answer}]}))
    questions, log = load("motionbench", file)
    assert questions == []
    assert log.counts == {"no public answer": 1}
    assert load("motionbench", file, hidden=True)[0][0].tasks == ("AO", "CM")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no question of FAVOR-Bench"):
        load("favor", FILES["motionbench"])
    with pytest.raises(ValueError, match="does not exist"):
        load("favor", tmp_path / "none.json")


# ---- answers ----


@pytest.mark.parametrize(
    "text",
    [
        '{"a#0": "x", "v.b": "y", "n": null}',
        '{"id": "a#0", "output": "x"}\n{"id": "v.b", "output": "y"}\n{"id": "n", "output": ""}\n',
        '[{"id": "a#0", "output": "x"}, {"id": "v.b", "output": "y"}, {"id": "n", "output": null}]',
        '{"a.mp4#0": "x"}\n{"v.b": "y"}\n\n{"n": ""}',
        '\ufeff{"a.MP4#0": "x", " v.b ": "y", "n": ""}',
    ],
)
def test_predictions_in_every_form(tmp_path: Path, text: str) -> None:
    file = tmp_path / "answers"
    file.write_text(text, encoding="utf-8")
    assert read_predictions(file, SkipLog()) == {"a#0": "x", "v.b": "y", "n": ""}


def test_questions_that_another_run_skipped_have_no_answer(tmp_path: Path) -> None:
    rows = [{"id": "a", "skipped": "unreadable"}, {"id": "b", "output": "B", "clip": "1 2 x"}]
    (tmp_path / "answers-00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_predictions(tmp_path / "answers-00000.jsonl", SkipLog()) == {"b": "B"}


def test_an_id_answered_twice(tmp_path: Path) -> None:
    file, log = tmp_path / "answers.json", SkipLog()
    file.write_text('{"a": "(B)", "a": "C", "b": "", "b": "D", "c": "?", "c": "!", "d": "It is B", "d": "A"}')
    assert read_predictions(file, log) == {"a": "(B)", "b": "D", "c": "!", "d": "A"}
    assert log.notes["prediction given twice for one id"] == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "neither json nor jsonl"),
        ('{"a": 3}', "the output of 'a' must be a text"),
        ('{"a": {"b": "c"}}', "the output of 'a' must be a text"),
        ("[1, 2]", "must map"),
        ('"a"', "must map"),
        ("[" * 100_000, "neither json nor jsonl"),
        (b"\xff{}", "not utf-8 at byte 0"),
    ],
)
def test_bad_predictions_are_refused(tmp_path: Path, text: str | bytes, why: str) -> None:
    file = tmp_path / "answers.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=why):
        read_predictions(file, SkipLog())


def test_a_half_written_line_is_as_if_never_written(tmp_path: Path) -> None:
    file = tmp_path / "answers-00000.jsonl"
    append_answers(file, [{"id": "a", "output": "x\u2028\ud800"}, {"id": "b", "skipped": "broken"}])
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole[:-cut])
        kept = read_answers(tmp_path)
        assert len(kept) == whole[:-cut].count(b"\n")
        mend_answers(file)
        append_answers(file, [{"id": "c", "output": ""}])
        assert set(read_answers(tmp_path)) == {*kept, "c"}


def test_an_answer_is_not_lost_to_a_row_that_says_skipped(tmp_path: Path) -> None:
    append_answers(
        tmp_path / "answers-00000.jsonl", [{"id": "a", "output": "x"}, {"id": "b", "skipped": "no"}]
    )
    append_answers(
        tmp_path / "answers-00001.jsonl", [{"id": "a", "skipped": "no"}, {"id": "b", "output": "y"}]
    )
    append_answers(tmp_path / "answers-00002.jsonl", [{"id": "b", "output": "z"}])
    assert {id: row["output"] for id, row in read_answers(tmp_path).items()} == {"a": "x", "b": "z"}


# ---- submissions ----


def test_motionbench_submission() -> None:
    questions, _ = load("motionbench", hidden=True)
    outputs = {"mr_0": "(B)", "cm_1": "A. left", "rc_1": "", "other": "C"}
    name, text = BENCHMARKS["motionbench"].submission(questions, outputs, Rules())
    assert name == "submission.json"
    assert json.loads(text) == {"mr_0": "B", "cm_1": "A", "rc_1": ""}


def test_favor_submission() -> None:
    questions, _ = load("favor")
    outputs = {"test-00000#0": "it moves left", "test-00000#2": "very quickly", "test-00002#1": 'It "blinks"'}
    name, text = BENCHMARKS["favor"].submission(questions, outputs, Rules())
    assert name == "submission.jsonl"
    rows = [json.loads(line) for line in text.splitlines()]
    assert [list(row) for row in rows] == [["test-00000"], ["test-00002"]]
    assert rows[0]["test-00000"][1] == {
        "task_type": "SAD",
        "correct_answer": "quickly",
        "output": "very quickly",
        "judge": False,
    }
    assert [a["judge"] for row in rows for answers in row.values() for a in answers] == [True, False, True]


# ---- clips ----


def test_clips_by_any_name(tmp_path: Path) -> None:
    for name in ("a.mp4", "b_0.5", "sub/c.MP4", "public-dataset/d.mkv", "e/f.mp4", "g/f.mp4", "videos/f.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = VideoFolder(tmp_path, ("self-collected", "public-dataset"))

    def found(name: str) -> str | None:
        path = clips.find(name)
        return None if path is None else path.relative_to(tmp_path).as_posix()

    assert found("a.mp4") == found("a") == "a.mp4"
    assert found("b_0.5") == "b_0.5"
    assert found("c") == found("c.mp4") == found("elsewhere/c.mp4") == "sub/c.MP4"
    assert found("d.mp4") == found("d") == "public-dataset/d.mkv"
    assert found("f") is None, "three files could be meant"
    assert found("e/f.mp4") == "e/f.mp4"
    assert VideoFolder(tmp_path, ("videos",)).find("f") == tmp_path / "videos" / "f.mp4"
    assert found("z.mp4") is None
    assert found("a\0") is None


def test_frames_as_the_paper_samples_them(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", clips=1, test_clips=1, frames=48, progress=False)
    clip = world.videos / "test-00000.mp4"  # six seconds
    default = EvalArguments().frames(student_family("qwen2_5_vl"))
    assert len(default.of(clip).frames) == 8, "as the toy's recipe"
    default = replace(default, num_frames=None)
    assert default.of(clip).timestamps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(EvalArguments().frames(student_family("internvl")).of(clip).frames) == 8
    assert len(replace(default, fps=0.5).of(clip).frames) == 4, "never fewer than four"
    assert len(replace(default, fps=0.5, min_frames=1).of(clip).frames) == 3
    assert len(replace(default, fps=8, max_frames=5).of(clip).frames) == 5
