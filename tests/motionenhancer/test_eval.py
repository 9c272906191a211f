"""The evaluation command on tiny real models: what it writes, what it survives, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eval_support import FAVOR, MOTIONBENCH, main, predict, results_of, scores_of, student_flags
from students_support import clip, sharp_student
from transformers import GenerationConfig

from motionenhancer import eval as evaluate
from motionenhancer.data import read_frames, read_samples
from motionenhancer.data.sampling import Frames
from motionenhancer.evaluation import generate
from motionenhancer.evaluation.generate import encode_request, generate_answers, greedy
from motionenhancer.students import load_student, student_family
from motionenhancer.toy.world import ToyFolder, write_world


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyFolder:
    """Six clips with a question each."""
    return write_world(tmp_path_factory.mktemp("eval_world"), clips=1, test_clips=6, progress=False)


# ---- answers made elsewhere ----


def test_motionbench_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "mr_0": "(B) It moves right",
        "mr_1": "b",
        "lm_0": "C. up",
        "cm_0": None,
        "mo_0": "I cannot tell",
        "ao_0": "B",
        "rc_0": "A or B",
        "rc_1": "B",
        "strange": "A",
    }
    # The folder of the predictions itself may receive the scores.
    assert (
        main(tmp_path, benchmark="motionbench", data=MOTIONBENCH, predictions=predict(tmp_path, given)) == 0
    )
    scores = scores_of(tmp_path)
    assert scores["overall"] == pytest.approx(100 * 3 / 7)
    assert scores["average"] == pytest.approx((50 + 100 + 0 + 0 + 100 + 0) / 6)
    assert {k: (v["accuracy"], v["count"]) for k, v in scores["tasks"].items()} == {
        "MR": (50, 2),
        "LM": (100, 1),
        "CM": (0, 1),
        "MO": (0, 1),
        "AO": (100, 1),
        "RC": (0, 1),
    }
    assert scores["skipped"] == 2
    assert scores["skipped_by_reason"] == {"no public answer": 2}
    low, high = scores["intervals"]["overall"]
    assert 0 <= low <= scores["overall"] <= high <= 100
    assert results_of(tmp_path)["mr_1"]["parsed"] == "b"
    assert json.loads((tmp_path / "submission.json").read_text())["mo_0"] == "I"
    printed = capsys.readouterr().out
    assert "57.04" in printed, "the paper's row"
    assert "1 × prediction for no question of this run" in printed


def test_the_stricter_reading_of_a_letter(tmp_path: Path) -> None:
    given = {"mr_0": "Because it moves", "mr_1": "a", "lm_0": "It is C", "rc_0": "B"}
    flags = {"benchmark": "motionbench", "data": MOTIONBENCH, "predictions": predict(tmp_path, given)}
    assert main(tmp_path / "a", **flags) == 0
    assert main(tmp_path / "b", **flags, letter_rule="lone") == 0
    published, lone = scores_of(tmp_path / "a"), scores_of(tmp_path / "b")
    right = [{k for k, v in results_of(tmp_path / run).items() if v["right"]} for run in "ab"]
    assert right == [{"mr_0", "rc_0"}, {"mr_1", "lm_0", "rc_0"}]
    assert published["unanswered"] == 3, "what has no answer is wrong, not left out"
    assert published["count"] == 7
    assert published["other_rules"]["overall"] == lone["overall"]
    assert published["other_rules"]["judged_differently"] == 3


def test_favor_predictions(tmp_path: Path) -> None:
    given = {
        "test-00000#0": "it moves left and then right",
        "test-00000.mp4#1": "The answer is TURNING.",
        "test-00000#2": "very quickly",
        "test-00001#0": "both shrink",
        "test-00001.mp4#1": "slow zoom in",
        "test-00002#0": "",
    }
    out = tmp_path / "out"
    flags = {"benchmark": "favor", "data": FAVOR, "predictions": predict(tmp_path, given)}
    assert main(out, **flags) == 0
    scores = scores_of(out)
    assert scores["overall"] == pytest.approx(100 * 2 / 7)
    assert scores["tasks"]["AS"]["count"] == 2
    assert scores["average"] == pytest.approx((0 + 100 + 0 + 100 + 0 + 0) / 6)
    assert scores["other_rules"]["judged_differently"] == 1, "Zoom in, Slow zoom in"
    assert len((out / "submission.jsonl").read_text().splitlines()) == 3
    assert main(out, **flags, option_rule="published") == 0, "scored again into the same folder"
    assert scores_of(out)["overall"] == pytest.approx(100 * 3 / 7)


def test_a_missing_clip_excuses_only_what_was_not_answered(tmp_path: Path, toy: ToyFolder) -> None:
    (tmp_path / "clips").mkdir()
    shutil.copy(toy.videos / "test-00000.mp4", tmp_path / "clips")
    given = predict(tmp_path, {"test-00001#0": "Both shrink"})
    flags = {"benchmark": "favor", "data": FAVOR, "predictions": given, "video_root": tmp_path / "clips"}
    assert main(tmp_path / "out", **flags) == 0
    scores = scores_of(tmp_path / "out")
    assert (scores["count"], scores["unanswered"], scores["skipped"]) == (4, 3, 3)
    assert scores["overall"] == 25
    assert scores["skipped_by_reason"] == {"missing video": 3}


# ---- a student's answers ----


def test_a_folder_cannot_ask_for_another_search_than_the_greedy_one() -> None:
    own = {"num_beams": 100_000, "num_return_sequences": 9, "penalty_alpha": 0.6, "do_sample": True}
    folder = SimpleNamespace(generation_config=GenerationConfig(**own, repetition_penalty=1.1))
    settings = greedy(folder, 12, 0)
    assert settings.get_generation_mode() == "greedy_search"
    assert (settings.num_return_sequences, settings.penalty_alpha, settings.repetition_penalty) == (
        1,
        None,
        1.1,
    )


def test_requests_are_what_the_chat_template_asks() -> None:
    """Token for token the template's own generation prompt, and the answers of plain transformers."""
    model, processor = sharp_student(layers=2)
    family = student_family("qwen2_5_vl")
    videos = [clip(4, 32, 48, seed=0), clip(2, 64, 32, seed=1), clip(6, 32, 32, seed=2)]
    prompts = ["What moves?", "Which object moves left?\nA. red\nB. blue", "x"]
    requests = [
        encode_request(family, processor, "q", text, video)
        for text, video in zip(prompts, videos, strict=True)
    ]
    settings = greedy(model, 12, processor.tokenizer.pad_token_id)
    together = generate_answers(model, processor, family, requests, settings)
    for text, video, request, answer in zip(prompts, videos, requests, together, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": text}]
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        inputs = processor(
            text=[rendered],
            videos=[frames],
            videos_kwargs={
                "do_sample_frames": False,
                "video_metadata": [
                    {
                        "total_num_frames": len(frames),
                        "fps": 2.0,
                        "frames_indices": list(range(len(frames))),
                    }
                ],
            },
            return_tensors="pt",
        )
        assert request.input_ids.tolist() == inputs["input_ids"][0].tolist()
        assert (request.labels == -100).all()
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
        plain = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        new = plain[:, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0]


def test_a_student_that_learned_the_answers_is_right(
    student_dir: Path, toy: ToyFolder, tmp_path: Path
) -> None:
    """After training on three questions it answers all three rightly, before training none."""
    samples = list(read_samples(toy.test, toy.videos))[:3]
    flags = {"data": toy.test, "video_root": toy.videos, "limit": 3, "video_fps": 2, "batch_size": 2}
    assert main(tmp_path / "before", student=student_dir, **flags) == 0
    assert scores_of(tmp_path / "before")["overall"] == 0
    model, processor, family = load_student(student_dir)
    encoded = [family.encode(processor, s, [read_frames(s.videos[0], num_frames=4)]) for s in samples]
    batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id)
    del batch["layouts"]
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(200):
        loss = model(**batch).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "fitted")
    processor.save_pretrained(tmp_path / "fitted")
    assert main(tmp_path / "after", student=tmp_path / "fitted", **flags) == 0
    assert scores_of(tmp_path / "after")["overall"] == 100


@pytest.mark.parametrize("held", ["scores.json", "submission.json", "results.jsonl", "config.json"])
def test_files_of_others_are_never_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    (tmp_path / held).write_text("mine")
    given = predict(tmp_path, {"mr_0": "B"})
    assert main(tmp_path, benchmark="motionbench", data=MOTIONBENCH, predictions=given) == 2
    assert f"--output_dir {tmp_path}: holds {held}, but no report" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {held, given.name}
    assert (tmp_path / held).read_text() == "mine"


def test_missing_and_broken_clips_are_counted(
    student_dir: Path, toy: ToyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    (clips / "deeper").mkdir(parents=True)
    shutil.copy(toy.videos / "test-00000.mp4", clips / "deeper" / "test-00000.mkv")
    (clips / "test-00002.mp4").write_bytes(b"no video")
    flags = {**student_flags(student_dir, toy), "video_root": clips, "workers": 1}
    assert main(tmp_path / "out", **flags) == 0
    scores = scores_of(tmp_path / "out")
    assert scores["count"] == 3
    assert scores["skipped"] == 4
    assert scores["skipped_by_reason"] == {"missing video": 2, "unreadable": 2}
    assert "4 skipped" in capsys.readouterr().out
    # A clip that arrives later: the same command asks the question of this clip only.
    shutil.copy(toy.videos / "test-00002.mp4", clips)
    assert main(tmp_path / "out", **flags) == 0
    scores = scores_of(tmp_path / "out")
    assert (scores["count"], scores["skipped_by_reason"]) == (5, {"missing video": 2})
    # Other clips make another run.
    assert main(tmp_path / "out", **flags | {"video_root": toy.videos}) == 2
    assert "video_root: " in capsys.readouterr().err
    (clips / "deeper" / "test-00000.mkv").unlink()
    flags |= {"limit": 3}
    assert main(tmp_path / "none", **flags) == 1, "a run without a single answer is not a success"
    assert "no question was answered" in capsys.readouterr().err
    assert scores_of(tmp_path / "none")["overall"] is None


@pytest.mark.parametrize(("given", "code"), [("", 1), ('{"other": "A"}', 1), ('{"mr_0": "A"}', 0)])
def test_predictions_without_a_single_answer_fail(tmp_path: Path, given: str, code: int) -> None:
    """An empty file would look like a model that is always wrong."""
    file = tmp_path / "given.json"
    file.write_text(given)
    assert main(tmp_path / "out", benchmark="motionbench", data=MOTIONBENCH, predictions=file) == code


def test_hidden_answers_are_asked_on_request(student_dir: Path, toy: ToyFolder, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for i in range(8):
        shutil.copy(toy.videos / f"test-0000{i % 6}.mp4", tmp_path / "clips" / f"test-0000{i}.mp4")
    flags = {
        **student_flags(student_dir, toy),
        "benchmark": "motionbench",
        "data": MOTIONBENCH,
        "video_root": tmp_path / "clips",
        "batch_size": 9,
        "max_new_tokens": 2,
        "answer_hidden": True,
    }
    assert main(tmp_path / "out", **flags) == 0
    letters = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert len(letters) == 9
    assert all(len(letter) <= 1 for letter in letters.values())
    assert scores_of(tmp_path / "out")["count"] == 7


def test_subtitles_are_another_run(
    student_dir: Path, toy: ToyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "videoID": "test-00000",
        "duration": "short",
        "question_id": "1",
        "question": "Which?",
        "answer": "B",
    }
    data = tmp_path / "videomme.json"
    data.write_text(json.dumps([{**row, "options": ["A. red", "B. blue", "C. green", "D. grey"]}]))
    flags = {**student_flags(student_dir, toy), "benchmark": "videomme", "data": data, "max_new_tokens": 2}
    (tmp_path / "srt").mkdir()
    assert main(tmp_path / "out", **flags, subtitles=tmp_path / "srt") == 2
    assert "must hold srt files such as test-00000.srt" in capsys.readouterr().err
    (tmp_path / "srt" / "test-00000.srt").write_text("1\n00:00:00,000 --> 00:01:00,000\nIt moves.\n")
    assert main(tmp_path / "out", **flags, subtitles=tmp_path / "srt") == 0
    assert scores_of(tmp_path / "out")["tasks"]["short"]["count"] == 1
    assert main(tmp_path / "out", **flags) == 2
    assert "already holds a different run" in capsys.readouterr().err


def test_parts_of_clips_from_a_folder_of_files(
    student_dir: Path, toy: ToyFolder, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """MVBench's layout; stopped after the first batch and started again."""
    part = {"video": "test-00000.mp4", "question": "Which?", "candidates": ["x", "y"], "answer": "y"}
    for name, row in (("action_sequence", {**part, "start": 0, "end": 0.5}), ("object_shuffle", part)):
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{name}.json").write_text(json.dumps([row, {**row, "question": "What?"}]))
    for folder in ("star/Charades_v1_480", "perception/videos"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(toy.videos / "test-00000.mp4", tmp_path / folder)
    flags = {**student_flags(student_dir, toy), "benchmark": "mvbench", "data": tmp_path / "json"}
    flags |= {"video_root": None, "max_new_tokens": 2, "batch_size": 2, "video_fps": 4, "min_frames": 1}
    assert main(tmp_path / "whole", **flags) == 0
    assert {task: one["count"] for task, one in scores_of(tmp_path / "whole")["tasks"].items()} == {
        "AS": 2,
        "OS": 2,
    }
    real, shown = generate.append_answers, []

    def stop(path: Path, rows: Any) -> None:
        if shown:
            raise KeyboardInterrupt
        shown.append(rows)
        real(path, rows)

    monkeypatch.setattr(generate, "append_answers", stop)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path / "out", **flags)
    monkeypatch.setattr(generate, "append_answers", real)
    assert main(tmp_path / "out", **flags) == 0
    for name in ("results.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    capsys.readouterr()
    file = tmp_path / "json" / "object_shuffle.json"
    file.write_text(file.read_text().replace("What?", "Who?"))
    assert main(tmp_path / "out", **flags) == 2
    assert "already holds a different run" in capsys.readouterr().err


# ---- comparing, defaults, refusals ----


def test_compare_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, answer in (("a", "A"), ("b", "B")):
        given = predict(
            tmp_path, dict.fromkeys(["mr_0", "mr_1", "lm_0", "cm_0", "mo_0", "ao_0", "rc_0"], answer)
        )
        assert main(tmp_path / name, benchmark="motionbench", data=MOTIONBENCH, predictions=given) == 0
    capsys.readouterr()
    assert main(tmp_path / "c", compare=(tmp_path / "a", tmp_path / "b")) == 0
    printed = capsys.readouterr().out
    assert "3 gained, 2 lost, p = 1" in printed
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert found["gained"] == ["mr_0", "ao_0", "rc_0"]
    assert found["lost"] == ["mr_1", "cm_0"]
    assert found["overall"]["difference"] == pytest.approx(100 / 7)
    assert main(tmp_path / "c", compare=(tmp_path / "a", tmp_path / "b"), task="RC") == 0
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["questions"] == 1
    assert main(tmp_path / "c", compare=(tmp_path / "a", tmp_path / "none")) == 2


def test_no_arguments_use_the_toy_world(
    toy: ToyFolder, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(student_dir, toy.student)
    monkeypatch.setattr(evaluate, "default_toy", lambda: toy)
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 0
    scores = scores_of(tmp_path / "runs" / "eval")
    assert scores["count"] == 6
    assert set(scores["tasks"]) == {"MR", "LM", "CM", "MO", "AO", "RC"}
    answers = {r["id"]: r["answer"] for r in results_of(tmp_path / "runs" / "eval").values()}
    given = predict(tmp_path, answers)
    assert main(tmp_path / "right", predictions=given, data=toy.test) == 0
    assert scores_of(tmp_path / "right")["overall"] == 100


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"benchmark": "favor"}, "needs --data, the benchmark's video_perspective.json"),
        ({"benchmark": "tempcompass_captioning"}, "invalid choice"),
        ({"student": "a", "predictions": FAVOR}, "exclude each other"),
        ({"compare": ("a",)}, "must name two runs"),
        ({"predictions": "none.json"}, "--predictions must be a file that exists, got none.json"),
        ({"student": "s", "data": "none.json"}, "--data must be a file or folder that exists, got none.json"),
        ({"task": "AS"}, "--task needs --compare"),
        ({"video_root": "."}, "--video_root . needs --data"),
        ({"video_root": "none"}, "--video_root must be a folder that exists, got none"),
        ({"num_frames": 3, "video_fps": 1}, "--num_frames and --video_fps exclude each other"),
        ({"min_frames": 9, "max_frames": 2}, "--min_frames must be at most --max_frames (2), got 9"),
        ({"video_fps": "nan"}, "--video_fps must be finite and above 0, got nan"),
        ({"max_pixels": -1}, "--max_pixels must be at least 0, got -1"),
        ({"seed": 2**32}, "--seed must be at least 0 and at most 4294967295, got 4294967296"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be at least 1"),
    ],
)
def test_contradicting_flags_are_refused(
    flags: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(tmp_path / "out", **flags)
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "family", "found"),
    [
        ({}, "qwen2_5_vl", Frames(None, 1.0, 4, 768, 151200)),
        ({}, "internvl", Frames(8, 1.0, 4, 768, 151200)),
        ({"max_frames": 2}, "qwen2_5_vl", Frames(None, 1.0, 2, 2, 151200)),
        ({"max_frames": 9}, "qwen2_5_vl", Frames(None, 1.0, 4, 9, 151200)),
        ({"num_frames": 3, "max_pixels": 0}, "internvl", Frames(3, 1.0, 4, 768, None)),
        ({"video_fps": 0.5, "min_frames": 1}, "internvl", Frames(None, 0.5, 1, 768, 151200)),
    ],
)
def test_flags_change_how_clips_are_shown(flags: dict[str, Any], family: str, found: Frames) -> None:
    arguments = evaluate.EvalArguments(student="s", data=str(FAVOR), benchmark="favor", **flags)
    assert arguments.frames(student_family(family)) == found
    plain = student_family("qwen2_5_vl")
    assert evaluate.EvalArguments(benchmark="toy").frames(plain).num_frames == 8
    trained = Frames(fps=2.0, max_frames=5, max_pixels=999)
    assert evaluate.EvalArguments(benchmark="toy").frames(plain, trained) == trained
    other = evaluate.EvalArguments(benchmark="toy", num_frames=3, max_pixels=0).frames(plain, trained)
    assert (other.num_frames, other.max_pixels) == (3, None)


def test_a_student_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path / "out", benchmark="favor", data=FAVOR, student="none") == 2
    assert "--student must be a transformers folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
