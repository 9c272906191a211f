"""Video-MME, MVBench, TempCompass and SEED-Bench: their files, clips, prompts, rules and submissions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from general_support import (
    CAPTIONS,
    MULTI_CHOICE,
    SEEDBENCH,
    TEMPLATE,
    VIDEOMME,
    YES_NO,
    asked,
    load,
    mvbench,
    verdicts,
)

from motionenhancer import eval as evaluate
from motionenhancer.data import SkipLog
from motionenhancer.data.clip import Clip
from motionenhancer.data.general_sets import MVBENCH_TASKS
from motionenhancer.data.sources import check_source, open_source
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, load_questions
from motionenhancer.evaluation.scores import judge_answers, score
from motionenhancer.evaluation.videos import VideoFolder

# ---- Video-MME ----


def test_videomme_rows(tmp_path: Path) -> None:
    (first, second), log = load("videomme", tmp_path, VIDEOMME)
    assert (first.id, first.video, first.answer, first.tasks) == ("001-1", "fFjv93ACGo8", "C", ("short",))
    assert (second.video, second.tasks) == ("Zz-_1", ("long",)), "the clip's name is taken from its address"
    assert log.total == 0
    assert asked("videomme", first) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nWhat colour is it?\nA. Black.\nB. Gray.\n"
        "C. Green.\nD. Brown.\nThe best answer is:"
    )


def test_videomme_template_and_parquet(tmp_path: Path) -> None:
    nested, _ = load("videomme", tmp_path, TEMPLATE)
    assert [(q.id, q.video, q.tasks) for q in nested] == [
        ("002-1", "002", ("medium",)),
        ("002-2", "002", ("medium",)),
    ]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(VIDEOMME), tmp_path / "test.parquet")
    log = SkipLog()
    questions = load_questions(BENCHMARKS["videomme"], tmp_path / "test.parquet", log)
    assert [(q.id, q.line) for q in questions] == [("001-1", 1), ("601-2", 2)]
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_questions(BENCHMARKS["videomme"], tmp_path / "bad.parquet", log)


def test_videomme_rule(tmp_path: Path) -> None:
    question = load("videomme", tmp_path, VIDEOMME)[0][0]
    outputs = {
        "C": True,
        "(C)": True,
        "C. Green.": True,
        "The best answer is: C": True,
        "The correct answer is C.": True,
        "it must be C": True,
        "c": False,
        "": False,
        "Best option: C": False,  # the B of "Best" comes first
        "Answer: C": False,  # the A of "Answer"
        "B or C": False,
        "Green": False,
    }
    assert verdicts("videomme", question, list(outputs)) == list(outputs.values())
    lone = verdicts("videomme", question, ["Best option: C", "Answer: C", "c", "B or C"], Rules("lone"))
    assert lone == [True, True, True, False]


# ---- MVBench ----


def test_mvbench_folder(tmp_path: Path) -> None:
    log = SkipLog()
    questions = load_questions(BENCHMARKS["mvbench"], mvbench(tmp_path), log)
    assert [(q.id, q.tasks[0], q.answer) for q in questions] == [
        ("action_antonym#0", "AA", "B"),
        ("action_sequence#0", "AS", "C"),
        ("moving_count#0", "MC", "B"),
        ("object_shuffle#0", "OS", "A"),
    ]
    assert log.counts == {"missing fields": 1, "bad segment": 1}
    assert sum(log.notes.values()) == 16, "the tasks without a file"
    clip = questions[1].video
    assert isinstance(clip, Clip)
    assert (str(clip.path), clip.start, clip.end) == ("star/Charades_v1_480/ZS9XR.mp4", 11.1, 19.6)
    assert asked("mvbench", questions[0]) == (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
        "movement of objects, and the action and pose of persons. Based on your observations, select the "
        "best option that accurately addresses the question.\n"
        "Question: What is it?\nOptions:\n(A) up\n(B) down\n(C) not sure\n"
        "Only give the best option."
    )
    one = load_questions(BENCHMARKS["mvbench"], tmp_path / "json" / "object_shuffle.json", SkipLog())
    assert [q.id for q in one] == ["object_shuffle#0"]


def test_mvbench_tasks_are_the_twenty_of_the_paper() -> None:
    assert len(MVBENCH_TASKS) == len({code for code, _ in MVBENCH_TASKS.values()}) == 20


def test_mvbench_clips_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    questions = load_questions(BENCHMARKS["mvbench"], mvbench(tmp_path), SkipLog())
    antonym, sequence, count, shuffle = (q.video for q in questions)

    def place(name: str) -> Path:
        path = tmp_path / "video" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def folder() -> VideoFolder:
        return VideoFolder(tmp_path, (), BENCHMARKS["mvbench"].renamed)

    other = place("clevrer/video_validation/v_1.mp4")
    assert folder().find(count) == other
    assert folder().find(shuffle) is None, "a clip of another task is another clip"
    mine = place("perception/videos/v_1.mp4")
    assert [folder().find(name) for name in (count, shuffle)] == [other, mine]
    assert folder().find(antonym) is None
    converted = place("ssv2_video_mp4/1.mp4")
    assert folder().find(antonym) == converted
    cut = place("star/Charades_segment/ZS9XR.mp4")
    assert folder().find(sequence) == cut, "a clip of the later archive is cut already"
    whole = place("star/Charades_v1_480/ZS9XR.mp4")
    assert folder().find(sequence) == Clip(whole, 11.1, 19.6)


def test_mvbench_rule(tmp_path: Path) -> None:
    question = load_questions(BENCHMARKS["mvbench"], mvbench(tmp_path), SkipLog())[0]
    outputs = {
        "(B) down": True,
        "(b)": True,
        "B": True,
        "b.": True,
        "B) down": True,
        "(B)down\n(A) up": True,
        " (B) down": True,
        "A": False,
        "B: down": False,
        "The answer is (B)": False,
        "(A) up, not (B)": False,
        "down": False,
        "(": False,
        "": False,
        " \n ": False,
    }
    assert verdicts("mvbench", question, list(outputs)) == list(outputs.values())
    assert verdicts("mvbench", question, ["B: down", "The answer is (B)"], Rules("lone")) == [True, True]


# ---- TempCompass ----


def test_tempcompass_files(tmp_path: Path) -> None:
    questions, log = load("tempcompass_multi_choice", tmp_path, MULTI_CHOICE)
    assert [(q.id, q.video, q.tasks) for q in questions] == [
        ("1034#action#0", "1034", ("action",)),
        ("1034#action#1", "1034", ("action",)),
        ("1034#direction#0", "1034", ("direction",)),
        ("1034_reverse#speed#0", "1034_reverse", ("speed",)),
    ]
    assert log.total == 0
    assert asked("tempcompass_multi_choice", questions[0]) == (
        "What is he doing?\nA. dunking\nB. dribbling\nPlease directly give the best option:"
    )
    rows = [
        {"video_id": video, "dim": aspect, **entry}
        for video, aspects in MULTI_CHOICE.items()
        for aspect, entries in aspects.items()
        for entry in entries
    ]
    lines = "\n".join(map(json.dumps, rows))
    assert load("tempcompass_multi_choice", tmp_path, rows)[0] == questions
    assert load("tempcompass_multi_choice", tmp_path, lines)[0] == questions
    (question,), _ = load("tempcompass_yes_no", tmp_path, YES_NO)
    assert asked("tempcompass_yes_no", question) == "Does he sit first?\nPlease answer yes or no:"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("multi_choice", YES_NO, "'1034#order#0' belongs to yes_no, which is another file"),
        ("multi_choice", CAPTIONS, "belongs to caption_matching"),
        ("yes_no", MULTI_CHOICE, "must be TempCompass's yes_no.json"),
        ("caption_matching", MULTI_CHOICE, "belongs to multi-choice"),
        (
            "multi_choice",
            {"1": {"taste": MULTI_CHOICE["1034"]["action"]}},
            "'taste' is no aspect of TempCompass",
        ),
        (
            "multi_choice",
            {"1": {"action": [{"question": "Tell.\nGenerated Caption:", "answer": "A. x"}]}},
            "captioning, which is not supported: a language model judges it",
        ),
        (
            "multi_choice",
            {"1": {"action": [{"question": "Which?\nA. x\nB. y", "answer": "C. z"}]}},
            "no question",
        ),
    ],
)
def test_other_forms_of_tempcompass_are_refused(name: str, value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        load(f"tempcompass_{name}", tmp_path, value)


def test_tempcompass_rules(tmp_path: Path) -> None:
    question = load("tempcompass_multi_choice", tmp_path, MULTI_CHOICE)[0][1]
    outputs = {"B": 1, "B. dunking": 1, "B) dunking": 1, "B.": 1, " B</s>": 1}
    outputs |= {"A": 0, "(B)": 0, "b": 0, "B dunking": 0, "dunking": 0, "": 0}
    assert verdicts("tempcompass_multi_choice", question, list(outputs)) == [*map(bool, outputs.values())]
    assert verdicts("tempcompass_multi_choice", question, ["(B)", "b"], Rules("lone")) == [True, True]

    question = load("tempcompass_yes_no", tmp_path, YES_NO)[0][0]
    shouted = replace(question, answer="Yes")
    assert verdicts("tempcompass_yes_no", shouted, ["yes", "no"]) == [True, False]
    outputs = {"yes": 1, "Yes, he does.": 1, "YES": 1, "no": 0, "He does, yes": 0, "": 0}
    assert verdicts("tempcompass_yes_no", question, list(outputs)) == [*map(bool, outputs.values())]

    first, second = load("tempcompass_caption_matching", tmp_path, CAPTIONS)[0]
    outputs = {
        "Caption B: It shrinks.": 1,
        "It shrinks.": 1,
        "Caption B": 1,
        "B": 1,
        "B.": 1,
        "(B) It shrinks.": 1,
    }
    outputs |= {"Caption A": 0, "b": 0, "It shrinks": 0, "Caption B It shrinks.": 0, "": 0}
    assert verdicts("tempcompass_caption_matching", first, list(outputs)) == [*map(bool, outputs.values())]
    outputs = {"1": 1, "Option 1.": 1, "Option 1: It grows.": 1, "2": 0, "Option 2": 0, "A": 0}
    assert verdicts("tempcompass_caption_matching", second, list(outputs)) == [*map(bool, outputs.values())]


def test_tempcompass_submission(tmp_path: Path) -> None:
    questions, _ = load("tempcompass_multi_choice", tmp_path, MULTI_CHOICE)
    outputs = {"1034#action#1": "B"}
    name, text = BENCHMARKS["tempcompass_multi_choice"].submission(questions, outputs, Rules())
    found = json.loads(text)
    assert name == "submission.json"
    assert {video: list(aspects) for video, aspects in found.items()} == {
        "1034": ["action", "direction"],
        "1034_reverse": ["speed"],
    }
    assert [entry["prediction"] for entry in found["1034"]["action"]] == [None, "B"]


# ---- SEED-Bench ----


@pytest.mark.parametrize("value", [SEEDBENCH, SEEDBENCH["questions"], json.dumps(SEEDBENCH)])
def test_seedbench_video_parts(value: Any, tmp_path: Path) -> None:
    questions, log = load("seedbench", tmp_path, value)
    assert [(q.id, q.tasks[0], q.answer) for q in questions] == [
        ("v1738", "Action Recognition", "B"),
        ("v1962", "Action Prediction", "B"),
        ("v4397", "Procedure Understanding", "C"),
    ]
    assert questions[0].video == "94328.webm"
    assert [(q.video.start, q.video.end) for q in questions[1:]] == [(648, 658), (18 / 15, 166 / 15)]
    assert log.total == 0
    assert log.notes == {"question about an image is not asked": 1}
    assert asked("seedbench", questions[0]) == (
        "What action?\nA. choice a\nB. choice b\nC. choice c\nD. choice d\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_seedbench_rule_clips_and_submission(tmp_path: Path) -> None:
    questions, _ = load("seedbench", tmp_path, SEEDBENCH)
    outputs = {"B": True, " B. choice b": True, "Because": True, "b": True, "(B)": False, "": False}
    assert verdicts("seedbench", questions[0], list(outputs)) == list(outputs.values())
    for camera in ("cam02", "cam01"):
        (tmp_path / "Breakfast" / "P06" / camera).mkdir(parents=True)
        clips = VideoFolder(tmp_path, (), BENCHMARKS["seedbench"].renamed)
        assert clips.find(questions[2].video) is None, "another camera's clip is another clip"
        (tmp_path / "Breakfast" / "P06" / camera / "P06_cereals.avi").touch()
    found = VideoFolder(tmp_path, (), BENCHMARKS["seedbench"].renamed).find(questions[2].video)
    assert isinstance(found, Clip)
    assert found.path.parent.name == "cam01"
    name, text = BENCHMARKS["seedbench"].submission(questions, {"v1962": "c, then"}, Rules())
    assert (name, [json.loads(line) for line in text.splitlines()]) == (
        "submission.jsonl",
        [{"question_id": "v1962", "prediction": "C"}],
    )


def test_frames_of_the_second_seedbench_are_no_clips(tmp_path: Path) -> None:
    row = {**SEEDBENCH["questions"][1], "data_id": ["task19/1.png", "task19/2.png"]}
    with pytest.raises(ValueError, match="a clip's file as data_id"):
        load("seedbench", tmp_path, {"questions": [row]})


# ---- all of them ----


@pytest.mark.parametrize(
    ("name", "value", "file", "why"),
    [
        (
            "videomme",
            [{**VIDEOMME[0], "duration": "endless"}],
            "f.json",
            "'endless' is no duration of Video-MME",
        ),
        ("mvbench", [{"video": "a"}], "action_smell.json", "'action_smell' is no task of MVBench"),
        (
            "seedbench",
            [{**SEEDBENCH["questions"][1], "question_type_id": 19}],
            "f.json",
            "19 is no part of SEED",
        ),
    ],
)
def test_unknown_tasks_are_refused_by_name(
    name: str, value: Any, file: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        load(name, tmp_path, value, file)


@pytest.mark.parametrize(
    ("name", "good", "bad", "file"),
    [
        ("videomme", VIDEOMME[0], {"answer": "A"}, "f.json"),
        ("videomme", VIDEOMME[0], {**VIDEOMME[0], "question_id": "x", "options": "abcd"}, "f.json"),
        (
            "mvbench",
            {"video": "a.mp4", "question": "q", "candidates": ["a"], "answer": "a"},
            {"video": "", "question": "q", "candidates": ["a"], "answer": "a"},
            "action_count.json",
        ),
        (
            "mvbench",
            {"video": "a.mp4", "question": "q", "candidates": ["a"], "answer": "a"},
            {"video": "b.mp4", "candidates": ["a"], "answer": "a"},
            "action_count.json",
        ),
        (
            "tempcompass_yes_no",
            {"video_id": "1", "dim": "order", "question": "q?", "answer": "no"},
            {"video_id": "1", "dim": "order", "question": "q?"},
            "f.json",
        ),
        ("seedbench", SEEDBENCH["questions"][1], {**SEEDBENCH["questions"][1], "choice_d": None}, "f.json"),
        *(
            (
                "seedbench",
                SEEDBENCH["questions"][1],
                {**SEEDBENCH["questions"][3], "segment": segment},
                "f.json",
            )
            for segment in ([9, 3], [18], [18, 166, 200], "18-166", [10**400, 1], [True, 166])
        ),
    ],
)
def test_broken_rows_are_counted_and_left_out(
    name: str, good: Any, bad: Any, file: str, tmp_path: Path
) -> None:
    questions, log = load(name, tmp_path, [bad, 7, good], file)
    assert len(questions) == 1
    assert log.total == 2


@pytest.mark.parametrize("name", ["videomme", "seedbench"])
@pytest.mark.parametrize("answer", ["NA", "", None, "E"])
def test_questions_without_a_public_answer(name: str, answer: Any, tmp_path: Path) -> None:
    row = {"videomme": VIDEOMME[0], "seedbench": SEEDBENCH["questions"][1]}[name]
    questions, log = load(name, tmp_path, [{**row, "answer": answer}])
    assert questions == []
    assert log.counts == {"no public answer": 1}
    assert len(load(name, tmp_path, [{**row, "answer": answer}], hidden=True)[0]) == 1


@pytest.mark.parametrize("name", ["videomme", "seedbench"])
def test_a_small_letter_is_an_answer_too(name: str, tmp_path: Path) -> None:
    row = {"videomme": VIDEOMME[0], "seedbench": SEEDBENCH["questions"][1]}[name]
    (question,), _ = load(name, tmp_path, [{**row, "answer": " b"}])
    assert question.answer == "B"


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("motionbench", "favor", "toy")])
def test_a_run_on_answers_made_elsewhere_and_a_comparison(name: str, tmp_path: Path) -> None:
    value = {
        "videomme": VIDEOMME,
        "tempcompass_multi_choice": MULTI_CHOICE,
        "tempcompass_yes_no": YES_NO,
        "tempcompass_caption_matching": CAPTIONS,
        "seedbench": SEEDBENCH,
    }.get(name)
    data = mvbench(tmp_path) if value is None else tmp_path / "file.json"
    if value is not None:
        data.write_text(json.dumps(value))
    questions = load_questions(BENCHMARKS[name], data, SkipLog())
    first, *others = questions
    runs = {"one": {first.id: first.answer}, "all": {q.id: q.answer for q in questions}}
    for run, outputs in runs.items():
        given = tmp_path / f"{run}.json"
        given.write_text(json.dumps(outputs))
        flags = ["--benchmark", name, "--data", str(data), "--predictions", str(given)]
        assert evaluate.main([*flags, "--output_dir", str(tmp_path / run), "--bootstrap_samples", "50"]) == 0
    scores = {run: json.loads((tmp_path / run / "scores.json").read_text()) for run in runs}
    assert scores["all"]["overall"] == 100
    assert scores["one"]["overall"] == pytest.approx(100 / len(questions))
    assert scores["one"]["unanswered"] == len(others)
    assert list(scores["all"]["tasks"]) == [
        task for task in BENCHMARKS[name].tasks if any(task in q.tasks for q in questions)
    ]
    compared = [
        "--compare",
        str(tmp_path / "one"),
        str(tmp_path / "all"),
        "--output_dir",
        str(tmp_path / "c"),
    ]
    assert evaluate.main(compared) == 0
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert found["gained"] == [q.id for q in others]


def test_a_changed_file_of_a_folder_is_another_run(tmp_path: Path) -> None:
    before = open_source(mvbench(tmp_path), folder=True).digest()
    file = tmp_path / "json" / "object_shuffle.json"
    file.write_text(file.read_text() + " ")
    assert open_source(tmp_path / "json", folder=True).digest() == before, "rows count, not their spaces"
    file.write_text(file.read_text().replace("Where", "When"))
    assert open_source(tmp_path / "json", folder=True).digest() != before


def test_a_folder_is_no_training_data_and_an_empty_one_no_benchmark(tmp_path: Path) -> None:
    folder = mvbench(tmp_path)
    with pytest.raises(ValueError, match="--data must be a file that exists"):
        check_source(folder, "--data")
    with pytest.raises(ValueError, match="is a folder"):
        open_source(folder)
    with pytest.raises(ValueError, match=r"--data must be a file or a folder with json files, .* holds none"):
        evaluate.EvalArguments(benchmark="mvbench", data=str(tmp_path))


def test_every_question_counts(tmp_path: Path) -> None:
    """Video-MME's own script leaves out answers without a letter; here they are wrong."""
    questions, _ = load("videomme", tmp_path, VIDEOMME)
    judged = judge_answers(BENCHMARKS["videomme"], questions, {"001-1": "C", "601-2": "none"}, Rules())
    assert score(judged, samples=0)["overall"] == 50
