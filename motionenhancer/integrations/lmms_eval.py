"""Benchmarks as tasks of lmms-eval: the same questions, prompts, rules and means, in its harness.

`eval --lmms_eval DIR` writes a task; `lmms_eval --include_path DIR --tasks motionenhancer_favor` runs it. The
task's yaml file names the functions below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.clip import Clip
from ..data.question import Question
from ..evaluation.benchmarks import BENCHMARKS, Benchmark, Rules
from ..evaluation.scores import Judged, judge_answers, score, task_order
from ..files import write_text

_TASK = """\
task: motionenhancer_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function motionenhancer.integrations.lmms_eval.clip
doc_to_text: !function motionenhancer.integrations.lmms_eval.request
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {max_new_tokens}, do_sample: false, temperature: 0}}
process_results: !function motionenhancer.integrations.lmms_eval.judge
metric_list:
"""
_METRIC = """\
  - metric: {metric}
    aggregation: !function motionenhancer.integrations.lmms_eval.{mean}
    higher_is_better: true
"""


def write_task(
    folder: Path,
    benchmark: Benchmark,
    rules: Rules,
    asked: Sequence[tuple[Question, str, Path | Clip]],
    max_new_tokens: int,
) -> Path:
    """Write a task's questions and its yaml file; return the yaml file's path.

    Args:
        folder: for lmms-eval's ``--include_path``.
        benchmark, rules, max_new_tokens: of the answers.
        asked: questions with a public answer, each with its prompt and its clip's file.

    Raises:
        ValueError: a question shows a part of a clip, which lmms-eval cannot.
    """
    rows = []
    for question, prompt, video in asked:
        if isinstance(video, Clip):
            raise ValueError(
                f"--lmms_eval: question {question.id!r} sets what is shown of its clip ({video}); lmms-eval "
                "shows whole clips"
            )
        row = asdict(question) | {"video": str(Path(video).absolute()), "request": prompt}
        rows.append(row | {"benchmark": benchmark.name, "rules": asdict(rules)})
    questions = (folder / f"motionenhancer_{benchmark.name}.jsonl").absolute()
    write_text(questions, "".join(json.dumps(row) + "\n" for row in rows))
    codes = task_order(benchmark.tasks, [task for question, *_ in asked for task in question.tasks])
    metrics = [("Overall", "overall"), ("Average", "average"), *((code, "overall") for code in codes)]
    place = json.dumps(str(questions))
    text = _TASK.format(name=benchmark.name, questions=place, max_new_tokens=max_new_tokens)
    text += "".join(_METRIC.format(metric=json.dumps(metric), mean=mean) for metric, mean in metrics)
    task = questions.with_suffix(".yaml")
    write_text(task, text)
    return task


def clip(doc: dict[str, Any]) -> list[str]:
    """The clip's file."""
    return [doc["video"]]


def request(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The prompt."""
    return doc["request"]


def judge(doc: dict[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The judged answer, for each mean that it counts in."""
    tasks, options = tuple(doc["tasks"]), tuple(doc["options"])
    question = Question(doc["id"], doc["video"], doc["text"], doc["answer"], tasks, options, doc["line"])
    rules = Rules(**doc["rules"])
    (judged,) = judge_answers(BENCHMARKS[doc["benchmark"]], [question], {question.id: results[0]}, rules)
    return dict.fromkeys(("Overall", "Average", *judged.tasks), asdict(judged))


def overall(rows: Iterable[dict[str, Any]]) -> float:
    """The share of right answers, in percent."""
    return score([Judged(**row) for row in rows], samples=0)["overall"]


def average(rows: Iterable[dict[str, Any]]) -> float:
    """The mean of the tasks' shares of right answers, in percent."""
    return score([Judged(**row) for row in rows], samples=0)["average"]
