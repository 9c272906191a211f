"""A benchmark's questions, read from its file as published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any, TypeGuard

from .clip import Clip
from .conversation import convert
from .motion_sets import tagged
from .skips import SkipLog
from .sources import open_source

MOTIONBENCH_TASKS: dict[str, str] = {
    "Motion Recognition": "MR",
    "Location-related Motion": "LM",
    "Camera Motion": "CM",
    "Motion-related Objects": "MO",
    "Action Order": "AO",
    "Repetition Count": "RC",
}
"""Published name of a task → its code. The toy world has questions of these tasks too."""
FAVOR_TASKS: tuple[str, ...] = ("AS", "HAC", "SAD", "MAD", "CM", "NSM")

_MOTIONBENCH_CODES = {name.lower(): code for name, code in MOTIONBENCH_TASKS.items()} | {
    code.lower(): code for code in MOTIONBENCH_TASKS.values()
}
_FAVOR_CODES = {code.lower(): code for code in FAVOR_TASKS}
_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts")


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, as published.

    id: unique in its benchmark.
    video: name of its clip in the file, with or without extension; a :class:`Clip` if the file also gives a
        segment or frames.
    text: the question, unchanged.
    answer: the right answer; None if it is not public.
    tasks: codes of its tasks, usually one.
    options: texts of the options, if the file gives them separately from the question.
    line: 1-based line of the file where the entry starts.
    """

    id: str
    video: str | Clip
    text: str
    answer: str | None
    tasks: tuple[str, ...]
    options: tuple[str, ...] = ()
    line: int = 0


def video_stem(name: str | Clip) -> str:
    """Return ``name`` without a video file extension; other dots stay.

    >>> video_stem("clip_0.5_2.MP4"), video_stem("clip_0.5_2")
    ('clip_0.5_2', 'clip_0.5_2')
    """
    name = fspath(name).strip()
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in _VIDEO_SUFFIXES else name


def read_motionbench(path: Path, log: SkipLog) -> Iterator[Question]:
    """Stream MotionBench's questions from ``video_info.meta.jsonl``, one clip a line.

    Each line is ``{"key", "video_path", "question_type", "qa": [{"uid", "question", "answer"}], ...}``
    (MotionBench, arXiv 2501.02955, and its repository). Options are part of the question text. The answer is
    a letter; on the test split it is ``"NA"``, not public, and ``Question.answer`` is None.

    Args:
        path: the file.
        log: counts unreadable entries. An unknown question type is a note and becomes a new task.

    Raises:
        ValueError: the file does not exist.
    """
    for line, row in read_objects(path, log):
        video = next((row[k] for k in ("video_path", "key") if filled(row.get(k))), None)
        if video is None or not isinstance(row.get("qa"), list):
            log.add("missing fields", line=line, detail="needs 'video_path' and a list 'qa'")
            continue
        for entry in row["qa"]:
            entry = entry if isinstance(entry, dict) else {}
            uid = entry.get("uid")
            uid = "" if uid is None or isinstance(uid, (bool, list, dict)) else str(uid).strip()
            if not uid or not filled(entry.get("question")):
                log.add("missing fields", id=uid, line=line, detail="a question needs 'uid' and 'question'")
                continue
            answer = entry["answer"].strip() if filled(entry.get("answer")) else "NA"
            types = entry.get("question_type") or row.get("question_type")
            types = types if isinstance(types, list) else [types]
            codes = dict.fromkeys(_task(one, _MOTIONBENCH_CODES, log) for one in types)
            shown = None if answer.upper() in ("NA", "N/A") else answer
            yield Question(uid, video, entry["question"], shown, tuple(codes) or ("unknown",), line=line)


def read_favor(path: Path, log: SkipLog) -> Iterator[Question]:
    """Stream FAVOR-Bench's close-ended questions from ``video_perspective.json``.

    Each element is ``{"video_name", "questions": [{"task_type", "question", "options", "correct_answer"}]}``
    (FAVOR-Bench, arXiv 2503.14935, and its repository). A question's id is the clip's name without extension,
    ``#`` and the question's index among the clip's.

    Args, Raises: as :func:`read_motionbench`.
    """
    for line, row in read_objects(path, log):
        video, questions = row.get("video_name"), row.get("questions")
        if not filled(video) or not isinstance(questions, list):
            log.add("missing fields", line=line, detail="needs 'video_name' and a list 'questions'")
            continue
        for index, entry in enumerate(questions):
            id = f"{video_stem(video)}#{index}"
            entry = entry if isinstance(entry, dict) else {}
            missing = [key for key in ("question", "correct_answer") if not filled(entry.get(key))]
            options = entry.get("options")
            if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
                missing.append("options")
            if missing:
                log.add("missing fields", id=id, line=line, detail=f"a question needs {', '.join(missing)}")
                continue
            tasks = (_task(entry.get("task_type"), _FAVOR_CODES, log),)
            answer = entry["correct_answer"]
            yield Question(id, video.strip(), entry["question"], answer, tasks, tuple(entry["options"]), line)


def read_toy(path: Path, log: SkipLog) -> Iterator[Question]:
    """Stream the toy world's ``test.jsonl``: LLaVA rows of one question; the id ends with its kind.

    A row without an id is called ``line-<n>``.

    Args, Raises: as :func:`read_motionbench`.
    """
    for line, row in read_objects(path, log):
        turns, id = row.get("conversations"), str(row.get("id") or f"line-{line}")
        turns = turns if isinstance(turns, list) else []
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
        if not filled(row.get("video")) or len(texts) != 2 or not all(map(filled, texts)):
            detail = "needs 'video' and 'conversations' of one question and its answer"
            log.add("missing fields", id=id, line=line, detail=detail)
            continue
        asked, told = ({"from": who, **turn} for who, turn in zip(("human", "gpt"), turns, strict=True))
        asked["value"] = tagged(asked["value"], "video")
        sample = convert({**row, "conversations": [asked, told]}, line, Path(), log, check_files=False)
        if sample is None:
            continue
        if len(sample.messages) != 2:
            log.add("unsupported key", id=id, line=line, detail="'system': a question has no system message")
            continue
        kind = id.rsplit("-", 1)[-1]
        task = kind if kind in MOTIONBENCH_TASKS.values() else "other"
        question, answer = (
            " ".join(part["text"] for part in message["content"] if part["type"] == "text")
            for message in sample.messages
        )
        clip = sample.videos[0]
        video = clip if isinstance(clip, Clip) else str(clip)
        yield Question(id, video, question, answer, (task,), line=line)


def read_objects(path: Path, log: SkipLog) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a data set with their lines. Other values are counted in ``log``."""
    for line, _, value, problem in open_source(path).rows():
        if problem:
            log.add("invalid json", line=line, detail=problem)
        elif not isinstance(value, dict):
            log.add("missing fields", line=line, detail=f"must be an object, got {type(value).__name__}")
        elif not _is_text(value):
            log.add("invalid text", line=line, detail="half a surrogate pair")
        else:
            yield line, value


def _is_text(value: Any) -> bool:
    """Whether all texts of a row can be written as utf-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=lambda other: "").encode()
    except UnicodeEncodeError:
        return False
    return True


def filled(value: Any) -> TypeGuard[str]:
    """Whether a value is a non-blank text."""
    return isinstance(value, str) and bool(value.strip())


def _task(given: Any, codes: dict[str, str], log: SkipLog) -> str:
    name = given.strip() if isinstance(given, str) else ""
    if name.lower() in codes:
        return codes[name.lower()]
    log.note(f"unknown question type {name!r} is scored as a task of its own")
    return name or "unknown"
