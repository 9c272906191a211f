"""Checkpoints in other evaluation suites, as docs/evaluation.md runs them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from motionenhancer import eval as evaluate
from motionenhancer.data import SkipLog
from motionenhancer.data.question import video_stem
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, load_questions, render_prompt
from motionenhancer.toy.world import build_toy

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
TASK = """
task: toy_motion
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.clip
doc_to_text: !function utils.question
doc_to_target: !function utils.answer
generation_kwargs:
  max_new_tokens: 12
process_results: !function utils.right
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def clip(doc): return [{videos!r} + "/" + doc["video"]]
def question(doc, lmms_eval_specific_kwargs=None):
    return doc["conversations"][0]["value"].replace("<video>", "").strip()
def answer(doc): return doc["conversations"][1]["value"]
def right(doc, results): return {{"right": float(results[0].strip() == answer(doc))}}
"""


def documented_command() -> list[str]:
    """The words of the page's lmms-eval command, from `-m lmms_eval` on."""
    command = re.search(r"accelerate launch .*?(-m lmms_eval .*?)\n```", PAGE.read_text(), re.DOTALL)
    assert command is not None
    return shlex.split(command[1].replace("\\\n", " "))


def model_options(command: list[str]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in command[command.index("--model_args") + 1].split(","))


def test_no_clip_is_larger_than_the_least_that_lmms_eval_is_told() -> None:
    options = model_options(documented_command())
    assert int(options["min_pixels"]) <= int(options["max_pixels"])


def run_documented(tmp_path: Path, student: Path, folder: Path, task: str) -> list[dict[str, Any]]:
    """The documented command on a student, on a CPU and without a network; returns the logged samples."""
    command = documented_command()
    options = model_options(command)
    options |= {"pretrained": str(student), "attn_implementation": "sdpa", "device_map": "cpu"}
    command[command.index("--model_args") + 1] = ",".join(f"{k}={v}" for k, v in options.items())
    command[command.index("--tasks") + 1] = task
    command[command.index("--output_path") + 1] = str(tmp_path / "out")
    command += ["--include_path", str(folder), "--device", "cpu", "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


@needs_lmms_eval
def test_lmms_eval_reads_a_checkpoint(tmp_path: Path) -> None:
    folder = build_toy(tmp_path / "world", clips=1, test_clips=2, progress=False)
    task = tmp_path / "task"
    task.mkdir()
    (task / "toy.yaml").write_text(TASK.format(data=folder.test))
    (task / "utils.py").write_text(UTILS.format(videos=str(folder.videos)))
    samples = run_documented(tmp_path, folder.student, task, "toy_motion")
    answers = [sample["filtered_resps"] for sample in samples]
    questions = folder.test.read_text().splitlines()
    assert len(answers) == len(questions) > 0
    assert all(answer.startswith("The ") for answer in answers), answers


@needs_lmms_eval
def test_lmms_eval_scores_our_task_as_we_do(tmp_path: Path) -> None:
    """Both judge the answers from lmms-eval, and agree on every question."""
    folder = build_toy(tmp_path / "world", clips=1, test_clips=8, progress=False)
    flags = ["--benchmark", "toy", "--data", str(folder.test), "--video_root", str(folder.videos)]
    assert evaluate.main([*flags, "--lmms_eval", str(tmp_path / "task")]) == 0
    samples = run_documented(tmp_path, folder.student, tmp_path / "task", "motionenhancer_toy")
    given = tmp_path / "given.json"
    given.write_text(json.dumps({s["Overall"]["id"]: s["filtered_resps"] for s in samples}))
    ours = ["--predictions", str(given), "--output_dir", str(tmp_path / "ours"), "--bootstrap_samples", "0"]
    assert evaluate.main([*flags[:-2], *ours]) == 0
    scores = json.loads((tmp_path / "ours" / "scores.json").read_text())
    judged = map(json.loads, (tmp_path / "ours" / "results.jsonl").read_text().splitlines())
    assert {s["Overall"]["id"]: s["Overall"]["right"] for s in samples} == {
        j["id"]: j["right"] for j in judged
    }
    (file,) = (tmp_path / "out").rglob("*_results.json")
    theirs = json.loads(file.read_text())["results"]["motionenhancer_toy"]
    means = {"Overall": scores["overall"], "Average": scores["average"]}
    means |= {code: task["accuracy"] for code, task in scores["tasks"].items()}
    assert {name: theirs[f"{name},none"] for name in means} == pytest.approx(means)
    assert scores["count"] == 8


class _Loader(yaml.SafeLoader):
    """Reads a task as lmms-eval does: a function by its dotted name."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


_Loader.add_constructor("!function", _function)


@pytest.mark.parametrize(
    ("name", "file", "answers"),
    [
        (
            "motionbench",
            "video_info.meta.jsonl",
            ["(B) It moves right", "b", "C. up", "", "no", "B", "A or B"],
        ),
        (
            "favor",
            "video_perspective.json",
            ["It moves left", "turning", "very quickly", "no", "", "x", "it blinks"],
        ),
    ],
)
@pytest.mark.parametrize("rule", ["published", "other"])
def test_a_written_task_scores_as_we_do(
    name: str, file: str, answers: list[str], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(__file__).parent / "data_eval" / file
    questions = load_questions(BENCHMARKS[name], data, SkipLog())
    for question in questions:
        (tmp_path / video_stem(question.video)).with_suffix(".mp4").touch()
    rules = ["--letter_rule", "lone", "--option_rule", "published"] if rule == "other" else []
    flags = ["--benchmark", name, "--data", str(data), *rules]
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([*flags, "--video_root", ".", "--lmms_eval", "task"]) == 0
    # lmms-eval may start in another folder.
    monkeypatch.chdir("/")
    task = yaml.load((tmp_path / "task" / f"motionenhancer_{name}.yaml").read_text(), Loader=_Loader)
    docs = list(map(json.loads, Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()))
    assert [doc["id"] for doc in docs] == [q.id for q in questions]
    options = {"benchmark": name, "data": str(data), "video_root": str(tmp_path)}
    again = evaluate.evaluate(**options, lmms_eval=str(tmp_path / "again"))
    assert again["questions"] == len(Path(again["task"]).with_suffix(".jsonl").read_text().splitlines())
    assert again["questions"] == len(questions)
    other = {"letter": "lone", "option": "published"}
    assert all(doc["rules"] == (other if rules else asdict(Rules())) for doc in docs)
    assert [task["doc_to_text"](doc) for doc in docs] == [
        render_prompt(BENCHMARKS[name].prompt, q) for q in questions
    ]
    assert all(Path(path).is_file() for doc in docs for path in task["doc_to_visual"](doc))
    assert task["generation_kwargs"]["max_new_tokens"] == BENCHMARKS[name].max_new_tokens
    results = [task["process_results"](doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    found = {
        metric["metric"]: metric["aggregation"](
            [r[metric["metric"]] for r in results if metric["metric"] in r]
        )
        for metric in task["metric_list"]
    }
    given = tmp_path / "given.json"
    given.write_text(json.dumps(dict(zip([doc["id"] for doc in docs], answers, strict=True))))
    ours = ["--predictions", str(given), "--output_dir", str(tmp_path / "ours"), "--bootstrap_samples", "0"]
    assert evaluate.main([*flags, *ours]) == 0
    scores = json.loads((tmp_path / "ours" / "scores.json").read_text())
    means = {code: task["accuracy"] for code, task in scores["tasks"].items()}
    assert found == means | {"Overall": scores["overall"], "Average": scores["average"]}
    assert 0 < scores["overall"] < 100


def test_a_part_of_a_clip_and_a_folder_without_clips_are_no_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "action_sequence.json"
    row = {"video": "a.mp4", "question": "q", "candidates": ["x", "y"], "answer": "x", "start": 1, "end": 2}
    data.write_text(json.dumps([row]))
    flags = ["--benchmark", "mvbench", "--data", str(data), "--lmms_eval", str(tmp_path / "task")]
    assert evaluate.main(flags) == 2
    assert "must hold the clips of the questions, none is there" in capsys.readouterr().err
    (tmp_path / "star" / "Charades_v1_480").mkdir(parents=True)
    (tmp_path / "star" / "Charades_v1_480" / "a.mp4").touch()
    assert evaluate.main(flags) == 2
    assert "'action_sequence#0' sets what is shown of its clip" in capsys.readouterr().err
    assert not (tmp_path / "task").exists()
