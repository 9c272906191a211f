"""FAVOR-Bench's close-ended file as published: ``video_perspective.json``, clips with their questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motionenhancer.data.question import Question, filled, read_rows, video_stem
from motionenhancer.data.skips import SkipLog

__all__ = ["FAVOR_TASKS", "read_favor"]

FAVOR_TASKS: tuple[str, ...] = ("AS", "HAC", "SAD", "MAD", "CM", "NSM")


def read_favor(path: str | Path, log: SkipLog | None = None) -> Iterator[Question]:
    """Stream FAVOR-Bench's close-ended questions.

    Each element is ``{"video_name", "questions": [{"task_type", "question", "options", "correct_answer"}]}``
    (FAVOR-Bench, arXiv 2503.14935, and its repository). A question's id is the clip's name without extension,
    ``#`` and the question's index among the clip's.

    Args:
        path: the file.
        log: counts what cannot be read; an unknown task type is a note and becomes a task of its own.

    Raises:
        ValueError: there is no such file.

    >>> import json, tempfile
    >>> row = {"video_name": "a.mp4", "questions": [{"task_type": "AS", "question": "What is first?",
    ...        "options": ["He sits", "He sits and stands"], "correct_answer": "He sits"}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "video_perspective.json"
    ...     _ = file.write_text(json.dumps([row]))
    ...     [(q.id, q.tasks, q.answer) for q in read_favor(file)]
    [('a#0', ('AS',), 'He sits')]
    """
    log = SkipLog() if log is None else log
    for line, row in read_rows(Path(path), log):
        video, questions = row.get("video_name"), row.get("questions")
        if not filled(video) or not isinstance(questions, list):
            log.add("missing fields", line=line, detail="needs 'video_name' and a list 'questions'")
            continue
        for index, entry in enumerate(questions):
            id = f"{video_stem(str(video))}#{index}"
            missing = _missing(entry)
            if missing:
                log.add("missing fields", id=id, line=line, detail=f"a question needs {missing}")
                continue
            yield Question(
                id,
                str(video).strip(),
                entry["question"],
                entry["correct_answer"],
                (_task(entry.get("task_type"), log),),
                tuple(entry["options"]),
                line,
            )


def _missing(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "to be an object"
    options = entry.get("options")
    if not filled(entry.get("question")):
        return "a text 'question'"
    if not filled(entry.get("correct_answer")):
        return "a text 'correct_answer'"
    if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
        return "a list of texts 'options'"
    return ""


def _task(given: Any, log: SkipLog) -> str:
    name = given.strip() if isinstance(given, str) else ""
    if name.upper() in FAVOR_TASKS:
        return name.upper()
    log.note(f"unknown task type {name!r} is scored as a task of its own")
    return name or "unknown"
