"""Checkpoints in other evaluation suites, as docs/evaluation.md runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from motionenhancer.toy.world import build_toy

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


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_reads_a_checkpoint(tmp_path: Path) -> None:
    """The documented command on the toy's student, on a CPU and without a network."""
    folder = build_toy(tmp_path / "world", clips=1, test_clips=2, progress=False)
    task = tmp_path / "task"
    task.mkdir()
    (task / "toy.yaml").write_text(TASK.format(data=folder.test))
    (task / "utils.py").write_text(UTILS.format(videos=str(folder.videos)))
    command = documented_command()
    options = model_options(command)
    options |= {"pretrained": str(folder.student), "attn_implementation": "sdpa", "device_map": "cpu"}
    command[command.index("--model_args") + 1] = ",".join(f"{k}={v}" for k, v in options.items())
    command[command.index("--tasks") + 1] = "toy_motion"
    command[command.index("--output_path") + 1] = str(tmp_path / "out")
    command += ["--include_path", str(task), "--device", "cpu", "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_toy_motion.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    questions = folder.test.read_text().splitlines()
    assert len(answers) == len(questions) > 0
    assert all(answer.startswith("The ") for answer in answers), answers
