"""MotionBench's file as published: ``video_info.meta.jsonl``, one clip a line with its questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motionenhancer.data.question import Question, filled, read_rows
from motionenhancer.data.skips import SkipLog

__all__ = ["MOTIONBENCH_TASKS", "read_motionbench"]

MOTIONBENCH_TASKS: dict[str, str] = {
    "Motion Recognition": "MR",
    "Location-related Motion": "LM",
    "Camera Motion": "CM",
    "Motion-related Objects": "MO",
    "Action Order": "AO",
    "Repetition Count": "RC",
}

_CODES = {name.lower(): code for name, code in MOTIONBENCH_TASKS.items()} | {
    code.lower(): code for code in MOTIONBENCH_TASKS.values()
}


def read_motionbench(path: str | Path, log: SkipLog | None = None) -> Iterator[Question]:
    """Stream MotionBench's questions.

    Each line is ``{"key", "video_path", "question_type", "qa": [{"uid", "question", "answer"}], ...}``
    (MotionBench, arXiv 2501.02955, and its repository). Options stand inline in the question; the answer is a
    letter, and ``"NA"`` on the test split, whose answers are not public: there ``Question.answer`` is None.

    Args:
        path: the file.
        log: counts what cannot be read; an unknown question type is a note and becomes a task of its own.

    Raises:
        ValueError: there is no such file.

    >>> import json, tempfile
    >>> row = {"video_path": "a.mp4", "question_type": "Action Order",
    ...        "qa": [{"uid": "q1", "question": "Which is first?\\nA. up\\nB. down", "answer": "B"}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "video_info.meta.jsonl"
    ...     _ = file.write_text(json.dumps(row))
    ...     [(q.id, q.video, q.tasks, q.answer) for q in read_motionbench(file)]
    [('q1', 'a.mp4', ('AO',), 'B')]
    """
    log = SkipLog() if log is None else log
    for line, row in read_rows(Path(path), log):
        video = next((row[k] for k in ("video_path", "key") if filled(row.get(k))), None)
        qa = row.get("qa")
        if video is None or not isinstance(qa, list):
            log.add("missing fields", line=line, detail="needs 'video_path' and a list 'qa'")
            continue
        for entry in qa:
            question = _question(entry, row, video, line, log)
            if question is not None:
                yield question


def _question(entry: Any, row: dict[str, Any], video: str, line: int, log: SkipLog) -> Question | None:
    uid = entry.get("uid") if isinstance(entry, dict) else None
    uid = "" if uid is None or isinstance(uid, (bool, list, dict)) else str(uid).strip()
    if not uid or not filled(entry.get("question")):
        log.add("missing fields", id=uid, line=line, detail="a question needs 'uid' and 'question'")
        return None
    given = entry.get("answer")
    answer = given.strip() if isinstance(given, str) else ""
    hidden = answer.upper() in ("", "NA", "N/A")
    tasks = _tasks(entry.get("question_type") or row.get("question_type"), log)
    return Question(uid, video, entry["question"], None if hidden else answer, tasks, line=line)


def _tasks(given: Any, log: SkipLog) -> tuple[str, ...]:
    found = []
    for name in given if isinstance(given, list) else [given]:
        name = name.strip() if isinstance(name, str) else ""
        code = _CODES.get(name.lower())
        if code is None:
            log.note(f"unknown question type {name!r} is scored as a task of its own")
            code = name or "unknown"
        found.append(code)
    return tuple(dict.fromkeys(found)) or ("unknown",)
