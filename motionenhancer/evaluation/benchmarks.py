"""The benchmarks: how their files are read, questions put, answers judged, and submissions written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionenhancer.data.question import (
    FAVOR_TASKS,
    MOTIONBENCH_TASKS,
    Question,
    read_favor,
    read_motionbench,
    read_toy,
    video_stem,
)
from motionenhancer.data.skips import SkipLog

from ..flags import Settings, setting
from .judge import first_letter, lone_letter, names_option, same_text

MOTIONBENCH_PROMPT = "{question}\nAnswer with the option's letter from the given choices directly."
FAVOR_PROMPT = (
    "Carefully watch the video and pay attention to temporal dynamics in this video, focusing on the camera "
    "motions, actions, activities, and interactions. Based on your observations, select the best option that "
    "accurately addresses the question.\n{question}\nYou can only response with the answer among {options}"
)
READINGS = {"letter": ("published", "lone"), "option": ("caseless", "published")}
"""Rule → its two readings, the default first."""


@dataclass(frozen=True)
class Rules(Settings):
    """Which form of a benchmark's rule judges an answer.

    letter: :func:`first_letter` or :func:`lone_letter`, for MotionBench.
    option: "published" where the authors' code differs (see :func:`names_option`), for FAVOR-Bench.
    """

    letter: str = setting(
        "published",
        "MotionBench. published: the authors' rule to find the letter; lone: a stricter rule.",
        flag="letter_rule",
        choices=READINGS["letter"],
    )
    option: str = setting(
        "caseless",
        "FAVOR-Bench. published: case matters if one option contains another; caseless: it never does.",
        flag="option_rule",
        choices=READINGS["option"],
    )


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks.

    name, title: on the command line, in print.
    file: what its file is called where it is published.
    tasks: codes in the order of the table.
    read: file and log to questions.
    prompt: template of a request; ``{question}`` and ``{options}`` are filled in.
    parse: an output's answer under the rules, for people to read; the output itself where it is matched.
    right: whether an output is right under the rules; only asked where the answer is public.
    max_new_tokens: length of an answer.
    rule: which of ``READINGS`` decides; empty where there is only one reading.
    submission: questions and id to output under the rules, in the benchmark's own format: file name, content.
    folders: below the video root, where the published archive keeps its clips.
    fps: frames a second that a student without a number of frames of its own is shown.
    """

    name: str
    title: str
    file: str
    tasks: tuple[str, ...]
    read: Callable[[Path, SkipLog], Iterator[Question]]
    prompt: str
    parse: Callable[[str, Rules], str]
    right: Callable[[Question, str, Rules], bool]
    max_new_tokens: int
    submission: Callable[[Sequence[Question], dict[str, str], Rules], tuple[str, str]]
    rule: str = ""
    folders: tuple[str, ...] = ()
    fps: float = 1.0


def load_questions(
    benchmark: Benchmark, path: str | Path, log: SkipLog, *, limit: int | None = None, hidden: bool = False
) -> list[Question]:
    """Read a benchmark's questions; those without a public answer and repeated ids are counted in ``log``.

    Args:
        path: the benchmark's file.
        limit: keep so many questions.
        hidden: keep the questions without a public answer too; they are counted all the same.

    Raises:
        ValueError: no such file, or no question in it.
    """
    questions = []
    seen: set[str] = set()
    for question in benchmark.read(Path(path), log):
        if question.id in seen:
            log.add("repeated id", id=question.id, line=question.line, detail="the first one counts")
            continue
        seen.add(question.id)
        if question.answer is None:
            log.add("no public answer", id=question.id, line=question.line)
        if question.answer is not None or hidden:
            questions.append(question)
    if not seen:
        raise ValueError(f"{path} holds no question of {benchmark.title}. {log.summary()}")
    return questions[:limit]


def render_prompt(template: str, question: Question) -> str:
    """Fill in ``{question}`` and ``{options}``, a Python list as FAVOR-Bench's authors print it.

    >>> question = Question("a", "v", "Is {options} left?", "x", ("T",), ("x", "y"))
    >>> render_prompt("{question} {options}", question)
    "Is {options} left? ['x', 'y']"
    """
    parts = {"{question}": question.text, "{options}": str(list(question.options))}
    return re.sub(r"\{question\}|\{options\}", lambda match: parts[match.group()], template)


def _letter(output: str, rules: Rules) -> str:
    return first_letter(output) if rules.letter == "published" else lone_letter(output)


def _text(output: str, rules: Rules) -> str:
    return output.strip()


def _favor_right(question: Question, output: str, rules: Rules) -> bool:
    match_case = rules.option == "published"
    return names_option(output, question.answer or "", question.options, match_case=match_case)


def _letters(questions: Sequence[Question], outputs: dict[str, str], rules: Rules) -> tuple[str, str]:
    """One json object, uid to letter: what the leaderboard takes."""
    letters = {q.id: _letter(outputs[q.id], rules) for q in questions if q.id in outputs}
    return "submission.json", json.dumps(letters, indent=4) + "\n"


def _texts(questions: Sequence[Question], outputs: dict[str, str], rules: Rules) -> tuple[str, str]:
    texts = {q.id: outputs[q.id] for q in questions if q.id in outputs}
    return "submission.json", json.dumps(texts, indent=1) + "\n"


def _judgements(questions: Sequence[Question], outputs: dict[str, str], rules: Rules) -> tuple[str, str]:
    """One line a clip, its name to the judged answers: what the authors' ``analyze_qa.py`` reads."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for q in questions:
        if q.id in outputs:
            judged = {
                "task_type": q.tasks[0],
                "correct_answer": q.answer,
                "output": outputs[q.id],
                "judge": _favor_right(q, outputs[q.id], rules),
            }
            clips.setdefault(video_stem(q.video), []).append(judged)
    lines = [json.dumps({name: answers}) + "\n" for name, answers in clips.items()]
    return "submission.jsonl", "".join(lines)


_ALL = (
    Benchmark(
        name="motionbench",
        title="MotionBench dev",
        file="video_info.meta.jsonl",
        tasks=tuple(MOTIONBENCH_TASKS.values()),
        read=read_motionbench,
        prompt=MOTIONBENCH_PROMPT,
        parse=_letter,
        right=lambda question, output, rules: _letter(output, rules) == question.answer,
        max_new_tokens=16,
        submission=_letters,
        rule="letter",
        folders=("self-collected", "public-dataset", "videos"),
    ),
    Benchmark(
        name="favor",
        title="FAVOR-Bench",
        file="video_perspective.json",
        tasks=FAVOR_TASKS,
        read=read_favor,
        prompt=FAVOR_PROMPT,
        parse=_text,
        right=_favor_right,
        max_new_tokens=256,
        submission=_judgements,
        rule="option",
        folders=("FAVOR-Bench", "videos", "videos/FAVOR-Bench"),
    ),
    Benchmark(
        name="toy",
        title="toy world",
        file="test.jsonl",
        tasks=(*MOTIONBENCH_TASKS.values(), "other"),
        read=read_toy,
        prompt="{question}",
        parse=_text,
        right=lambda question, output, rules: same_text(output, question.answer or ""),
        max_new_tokens=48,
        submission=_texts,
        fps=8.0,  # its clips last two seconds
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
