"""The benchmarks: how their files are read, questions put, answers judged, and submissions written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data import general_sets
from ..data.question import (
    FAVOR_TASKS,
    MOTIONBENCH_TASKS,
    Question,
    read_favor,
    read_motionbench,
    read_toy,
    video_stem,
)
from ..data.skips import SkipLog
from ..flags import Settings, setting
from . import judge

LETTER_PROMPT = "{question}\nAnswer with the option's letter from the given choices directly."
FAVOR_PROMPT = (
    "Carefully watch the video and pay attention to temporal dynamics in this video, focusing on the camera "
    "motions, actions, activities, and interactions. Based on your observations, select the best option that "
    "accurately addresses the question.\n{question}\nYou can only response with the answer among {options}"
)
VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\n{question}\nThe best answer is:"
)
MVBENCH_PROMPT = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the best "
    "option that accurately addresses the question.\n{question}\nOnly give the best option."
)
TEMPCOMPASS_CHOICE_PROMPT = "{question}\nPlease directly give the best option:"
TEMPCOMPASS_YES_NO_PROMPT = "{question}\nPlease answer yes or no:"
DOUBT_PROMPT = (
    "\nYou will receive a {kind} question, the ground-truth answer and the prediction from a question "
    "answering (QA) model. Your task is to determine whether QA model prediction is correct, based on the "
    'question and ground-truth answer. If the prediction is correct, respond "Correct". If the prediction '
    'is incorrect, respond "Incorrect".\n\n{title} Question:\n{question}\nGround-Truth Answer: {answer}\n'
    "Model Prediction: {output}"
)
READINGS = {"letter": ("published", "lone"), "option": ("caseless", "published")}
"""Rule → its two readings, the default first."""


@dataclass(frozen=True)
class Rules(Settings):
    """The variant of a benchmark's rule that judges an answer.

    letter: "published", the authors' rule, such as :func:`first_letter` for MotionBench; or "lone", for
        :func:`lone_letter`.
    option: for FAVOR-Bench; "published" as in the authors' code, see :func:`names_option`.
    """

    letter: str = setting(
        "published",
        "Answers by letter. published: the authors' rule to find the letter; lone: a stricter rule.",
        flag="letter_rule",
        choices=READINGS["letter"],
    )
    option: str = setting(
        "caseless",
        "FAVOR-Bench. published: case matters if one option contains another; caseless: case never matters.",
        flag="option_rule",
        choices=READINGS["option"],
    )


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks.

    name, title: name on the command line, and in print.
    file: published name of its file.
    tasks: codes in the order of the table.
    read: file and log to questions.
    prompt: template of a request; ``{question}`` and ``{options}`` are filled in.
    right: whether an output is right under the rules; only called if the answer is public.
    submission: (questions, id → output, rules) → file name and content in the benchmark's own format.
    parse: an output's answer under the rules, for people to read; the output itself if a text is compared.
    max_new_tokens: length of an answer.
    rule: name in ``READINGS`` of the rule that reads an answer; empty if there is only one rule.
    folders: below the video root, where the published archive keeps its clips.
    renamed: folder of clips → its name in later archives; None if folders are not part of the names.
    num_frames: number of evenly spaced frames of a clip; None: one frame per second.
    doubt: output that no rule can read → the request to a judge model, empty for any other output. None if
        the authors ask no model.
    """

    name: str
    title: str
    file: str
    tasks: tuple[str, ...]
    read: Callable[[Path, SkipLog], Iterator[Question]]
    prompt: str
    right: Callable[[Question, str, Rules], bool]
    submission: Callable[[Sequence[Question], dict[str, str], Rules], tuple[str, str]]
    parse: Callable[[str, Rules], str] = lambda output, rules: output.strip()
    max_new_tokens: int = 16
    rule: str = ""
    folders: tuple[str, ...] = ()
    renamed: Mapping[str, str] | None = None
    num_frames: int | None = None
    doubt: Callable[[Question, str, Rules], str] | None = None


def load_questions(
    benchmark: Benchmark, path: str | Path, log: SkipLog, *, limit: int | None = None, hidden: bool = False
) -> list[Question]:
    """Read a benchmark's questions. Those without a public answer, and repeated ids, are counted in ``log``.

    Args:
        path: the benchmark's file.
        limit: maximum number of questions.
        hidden: keep the questions without a public answer; they are still counted.

    Raises:
        ValueError: the file does not exist or has no question.
    """
    questions = []
    seen: set[str] = set()
    for question in benchmark.read(Path(path) if isinstance(path, str) else path, log):
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


def _by_id(
    parse: Callable[[str, Rules], str], questions: Sequence[Question], outputs: dict[str, str], rules: Rules
) -> tuple[str, str]:
    """One json object, id to answer: what MotionBench's leaderboard takes."""
    found = {q.id: parse(outputs[q.id], rules) for q in questions if q.id in outputs}
    return "submission.json", json.dumps(found, indent=4) + "\n"


def _ranked(
    parse: Callable[[str, Rules], str], questions: Sequence[Question], outputs: dict[str, str], rules: Rules
) -> tuple[str, str]:
    """One line a question: what SEED-Bench's leaderboard takes."""
    found = {q.id: parse(outputs[q.id], rules) for q in questions if q.id in outputs}
    rows = [{"question_id": id, "prediction": answer} for id, answer in found.items()]
    return "submission.jsonl", "".join(json.dumps(row) + "\n" for row in rows)


def _by_letter(published: Callable[[str], str], submission: Callable[..., Any] = _by_id) -> dict[str, Any]:
    """The fields of a benchmark whose answers are letters, or options that begin with one."""

    def letter(output: str, rules: Rules) -> str:
        return published(output) if rules.letter == "published" else judge.lone_letter(output)

    def right(question: Question, output: str, rules: Rules) -> bool:
        return letter(output, rules) == (question.answer or "")[:1]

    return {"parse": letter, "right": right, "rule": "letter", "submission": partial(submission, letter)}


def _favor_right(question: Question, output: str, rules: Rules) -> bool:
    match_case = rules.option == "published"
    return judge.names_option(output, question.answer or "", question.options, match_case=match_case)


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


def _aspects(questions: Sequence[Question], outputs: dict[str, str], rules: Rules) -> tuple[str, str]:
    """Clip to aspect to its answers: what TempCompass's `eval_*.py` read."""
    clips: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for q in questions:
        said = {"question": q.text, "answer": q.answer, "prediction": outputs.get(q.id)}
        clips.setdefault(str(q.video), {}).setdefault(q.tasks[0], []).append(said)
    return "submission.json", json.dumps(clips, indent=4) + "\n"


def _tempcompass(
    form: str, kind: str, prompt: str, read: Callable[[str, Sequence[str]], str], **fields: Any
) -> Benchmark:
    """One form of TempCompass's questions.

    Args:
        form: name of its file.
        kind: name of the form in a request to a judge model.
        prompt: template of a request.
        read: (output, options) → what the authors' rule reads; empty if a judge model must be asked.
        fields: of the benchmark. Without ``right``, an output is right if ``read`` returns the answer.
    """

    def doubt(question: Question, output: str, rules: Rules) -> str:
        if read(output, question.options):
            return ""
        said = output.replace("</s>", "").strip()
        about = {"question": question.text, "answer": question.answer, "output": said}
        return DOUBT_PROMPT.format(kind=kind, title=kind.title(), **about)

    return Benchmark(
        name=f"tempcompass_{form.replace('-', '_')}",
        title=f"TempCompass {kind.lower()}",
        file=f"{form}.json",
        tasks=general_sets.TEMPCOMPASS_ASPECTS,
        read=partial(general_sets.read_tempcompass, form=form),
        prompt=prompt,
        max_new_tokens=128,
        folders=("videos",),
        doubt=doubt,
        **{"right": lambda question, output, rules: read(output, question.options) == question.answer}
        | fields
        | {"submission": _aspects},
    )


_ALL = (
    Benchmark(
        name="motionbench",
        title="MotionBench dev",
        file="video_info.meta.jsonl",
        tasks=tuple(MOTIONBENCH_TASKS.values()),
        read=read_motionbench,
        prompt=LETTER_PROMPT,
        folders=("self-collected", "public-dataset", "videos"),
        **_by_letter(judge.first_letter),
    ),
    Benchmark(
        name="favor",
        title="FAVOR-Bench",
        file="video_perspective.json",
        tasks=FAVOR_TASKS,
        read=read_favor,
        prompt=FAVOR_PROMPT,
        right=_favor_right,
        max_new_tokens=256,
        submission=_judgements,
        rule="option",
        folders=("FAVOR-Bench", "videos", "videos/FAVOR-Bench"),
    ),
    Benchmark(
        name="videomme",
        title="Video-MME",
        file="test-00000-of-00001.parquet",
        tasks=general_sets.VIDEOMME_DURATIONS,
        read=general_sets.read_videomme,
        prompt=VIDEOMME_PROMPT,
        folders=("data", "videos"),
        **_by_letter(judge.videomme_letter),
    ),
    Benchmark(
        name="mvbench",
        title="MVBench",
        file="folder json",
        tasks=tuple(code for code, _ in general_sets.MVBENCH_TASKS.values()),
        read=general_sets.read_mvbench,
        prompt=MVBENCH_PROMPT,
        max_new_tokens=100,
        renamed=general_sets.MVBENCH_FOLDERS,
        **_by_letter(judge.mvbench_letter),
    ),
    _tempcompass(
        "multi-choice",
        "multi-choice",
        TEMPCOMPASS_CHOICE_PROMPT,
        lambda output, options: judge.tempcompass_letter(output),
        **_by_letter(judge.tempcompass_letter),
    ),
    _tempcompass(
        "yes_no",
        "Yes/No",
        TEMPCOMPASS_YES_NO_PROMPT,
        lambda output, options: judge.yes_or_no(output),
        parse=lambda output, rules: judge.yes_or_no(output),
        right=lambda question, output, rules: judge.yes_or_no(output) == (question.answer or "").lower(),
    ),
    _tempcompass("caption_matching", "caption matching", TEMPCOMPASS_CHOICE_PROMPT, judge.matched_caption),
    Benchmark(
        name="seedbench",
        title="SEED-Bench video",
        file="SEED-Bench.json",
        tasks=tuple(general_sets.SEEDBENCH_TASKS.values()),
        read=general_sets.read_seedbench,
        prompt=LETTER_PROMPT,  # the one that lmms-eval asks SEED-Bench with
        renamed={},
        **_by_letter(lambda output: output.strip()[:1].upper(), _ranked),
    ),
    Benchmark(
        name="toy",
        title="toy world",
        file="test.jsonl",
        tasks=(*MOTIONBENCH_TASKS.values(), "other"),
        read=read_toy,
        prompt="{question}",
        right=lambda question, output, rules: judge.same_text(output, question.answer or ""),
        max_new_tokens=48,
        submission=partial(_by_id, lambda output, rules: output),
        num_frames=8,  # as the toy's recipe
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
