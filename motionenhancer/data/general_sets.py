"""Questions of the general video benchmarks, read from their files as published.

If a benchmark's authors append the options to the question, `Question.text` holds them as they print them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .clip import clip_of
from .question import Question, filled, read_objects
from .skips import SkipLog

VIDEOMME_DURATIONS = ("short", "medium", "long")
TEMPCOMPASS_ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
SEEDBENCH_TASKS = {10: "Action Recognition", 11: "Action Prediction", 12: "Procedure Understanding"}
"""SEED-Bench's video parts: `question_type_id` → name. Parts 1 to 9 are about images."""
_IMAGES = range(1, 10)
_BREAKFAST_FPS = 15
"""Frames per second of the clips of part 12. The segments of that part are counted in frames."""

MVBENCH_TASKS = {
    "action_sequence": ("AS", "star/Charades_v1_480"),
    "action_prediction": ("AP", "star/Charades_v1_480"),
    "action_antonym": ("AA", "ssv2_video"),
    "fine_grained_action": ("FA", "Moments_in_Time_Raw/videos"),
    "unexpected_action": ("UA", "FunQA_test/test"),
    "object_existence": ("OE", "clevrer/video_validation"),
    "object_interaction": ("OI", "star/Charades_v1_480"),
    "object_shuffle": ("OS", "perception/videos"),
    "moving_direction": ("MD", "clevrer/video_validation"),
    "action_localization": ("AL", "sta/sta_video"),
    "scene_transition": ("ST", "scene_qa/video"),
    "action_count": ("AC", "perception/videos"),
    "moving_count": ("MC", "clevrer/video_validation"),
    "moving_attribute": ("MA", "clevrer/video_validation"),
    "state_change": ("SC", "perception/videos"),
    "fine_grained_pose": ("FP", "nturgbd"),
    "character_order": ("CO", "perception/videos"),
    "egocentric_navigation": ("EN", "vlnqa"),
    "episodic_reasoning": ("ER", "tvqa/frames_fps3_hq"),
    "counterfactual_inference": ("CI", "clevrer/video_validation"),
}
"""Name of a task's file → its code in the paper, and the folder of its clips."""
MVBENCH_FOLDERS = {
    "star/Charades_v1_480": "star/Charades_segment",
    "sta/sta_video": "sta/sta_video_segment",
    "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
    "nturgbd": "nturgbd_convert",
    "ssv2_video": "ssv2_video_mp4",
}
"""Folder of clips → its name in later archives. Clips of a `_segment` folder are cut already."""


def read_videomme(path: Path, log: SkipLog) -> Iterator[Question]:
    """Stream Video-MME's questions from its parquet file, from rows like it, or from the authors' template.

    A row is ``{"question_id", "videoID", "duration", "question", "options", "answer"}``. The template nests
    the questions of a clip and calls the keys ``duration_category`` and ``choices`` (Video-MME, arXiv
    2405.21075, and its repository). The name of a clip is its ``videoID``, else the id in its ``url``,
    else its ``video_id``.

    Raises:
        ValueError: the file does not exist, or a duration is not one of Video-MME.
    """
    for line, row in read_objects(path, log):
        nested = row.get("questions")
        for entry in nested if isinstance(nested, list) else [row]:
            entry = {**row, **entry} if isinstance(entry, dict) else row
            watched = parse_qs(urlsplit(_text(entry, "url")).query).get("v", [""])[0]
            id, video = _text(entry, "question_id"), _text(entry, "videoID") or watched
            video = video or _text(entry, "video_id")
            options = _first(entry, "options", "choices")
            shown = tuple(options) if isinstance(options, (list, tuple)) else ()
            answer = _text(entry, "answer").upper()
            if not (id and video and filled(entry.get("question")) and shown and all(map(filled, shown))):
                needs = "needs question_id, videoID, question and options"
                log.add("missing fields", id=id, line=line, detail=needs)
                continue
            duration = _first(entry, "duration", "duration_category")
            task = _known(duration, VIDEOMME_DURATIONS, "duration of Video-MME", path)
            text = "\n".join([entry["question"], *shown])
            yield Question(id, video, text, answer if answer in [*"ABCD"] else None, (task,), shown, line)


def read_mvbench(path: Path, log: SkipLog) -> Iterator[Question]:
    """Stream MVBench's questions from a task's file, or from the folder of the 20 files.

    A file is a list of ``{"video", "question", "candidates", "answer"}``, for some tasks with ``start`` and
    ``end`` in seconds (MVBench, arXiv 2311.17005, and its notebook). A question's id is the file's name,
    ``#`` and its index; its answer is the letter of the candidate.

    Raises:
        ValueError: the file does not exist, the folder has no file, or a file is not a task of MVBench.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--data {path} must hold MVBench's json files; it holds none")
    for file in files:
        code, folder = MVBENCH_TASKS[_known(file.stem, MVBENCH_TASKS, "task of MVBench", file)]
        for index, (line, row) in enumerate(read_objects(file, log)):
            id, options = f"{file.stem}#{index}", row.get("candidates")
            options = options if isinstance(options, list) and all(map(filled, options)) else []
            named = filled(row.get("video")) and filled(row.get("question"))
            if not named or not options or row.get("answer") not in options:
                needs = "needs video, question, and candidates with the answer among them"
                log.add("missing fields", id=id, line=line, detail=f"{file.name} {needs}")
                continue
            bounds = {f"video_{key}": row[key] for key in ("start", "end") if row.get(key) is not None}
            video = _cut(f"{folder}/{row['video'].strip()}", bounds, id, line, log)
            if video is None:
                continue
            shown = "\n".join(f"({chr(65 + i)}) {option}" for i, option in enumerate(options))
            text = f"Question: {row['question']}\nOptions:\n{shown}"
            answer = chr(65 + options.index(row["answer"]))
            yield Question(id, video, text, answer, (code,), tuple(options), line)
    if path.is_dir():
        for name in MVBENCH_TASKS.keys() - {file.stem for file in files}:
            log.note(f"no file of MVBench's task {name!r}")


def read_tempcompass(path: Path, log: SkipLog, *, form: str) -> Iterator[Question]:
    """Read TempCompass's questions of one form.

    The file is ``{video: {aspect: [{"question", "answer"}]}}`` (TempCompass, arXiv 2403.00476, and its
    repository), or rows ``{"video_id", "dim", "question", "answer"}``. A question's id is
    ``<video>#<aspect>#<index>``.

    Args:
        path, log: the file, and what counts questions that cannot be read.
        form: "multi-choice", "yes_no" or "caption_matching": the name of the file.

    Raises:
        ValueError: the file does not exist, an aspect is not one of TempCompass, or questions have another
            form.
    """
    for id, video, aspect, entry in _tempcompass_rows(path, log):
        question, answer = entry.get("question"), _text(entry, "answer") or _text(entry, "mc_answer")
        if not (filled(question) and answer and video):
            log.add("missing fields", id=id, detail="needs a video, question and answer")
            continue
        options = tuple(option.strip() for option in question.split("\n")[1:])
        told = "mc_question" in entry or question.rstrip().endswith("Generated Caption:")
        found = "captioning" if told else _tempcompass_form(answer, options)
        if found is None:
            log.add("missing fields", id=id, detail=f"the answer {answer!r} is none of the options")
            continue
        if found != form:
            other = "is not supported: a language model judges it" if told else "is another file"
            raise ValueError(
                f"--data {path} must be TempCompass's {form}.json; {id!r} belongs to {found}, which {other}"
            )
        task = _known(aspect, TEMPCOMPASS_ASPECTS, "aspect of TempCompass", path)
        yield Question(id, video, question, answer, (task,), options)


def _tempcompass_form(answer: str, options: tuple[str, ...]) -> str | None:
    if not options and answer.lower() in ("yes", "no"):
        return "yes_no"
    if answer in options:
        return "multi-choice" if answer[1:3] == ". " else "caption_matching" if ": " in answer else None
    return None


def _tempcompass_rows(path: Path, log: SkipLog) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    whole = _document(path)
    if whole and "video_id" not in whole:
        for video, aspects in whole.items():
            for aspect, entries in aspects.items() if isinstance(aspects, dict) else ():
                for index, entry in enumerate(entries if isinstance(entries, list) else ()):
                    entry = entry if isinstance(entry, dict) else {}
                    yield f"{video}#{aspect}#{index}", video, aspect, entry
        return
    counts: dict[tuple[str, str], int] = {}
    for _, row in read_objects(path, log):
        place = _text(row, "video_id"), _text(row, "dim")
        counts[place] = counts.get(place, -1) + 1
        yield f"{place[0]}#{place[1]}#{counts[place]}", place[0], row.get("dim"), row


def read_seedbench(path: Path, log: SkipLog) -> Iterator[Question]:
    """Read the questions of SEED-Bench's three video parts. Questions about images are counted as a note.

    The file is ``{"questions": [...]}`` or its rows: ``{"question_id", "question_type_id", "data_id",
    "question", "choice_a" to "choice_d", "answer"}``, with a ``segment`` in seconds (part 11) or in frames at
    15 a second (part 12) (SEED-Bench, arXiv 2307.16125, and its repository).

    Raises:
        ValueError: the file does not exist, or a part is not one of SEED-Bench.
    """
    rows = _document(path).get("questions")
    entries = ((0, row) for row in rows) if isinstance(rows, list) else read_objects(path, log)
    for line, row in entries:
        row = row if isinstance(row, dict) else {}
        id, part = _text(row, "question_id"), row.get("question_type_id")
        if part in _IMAGES:
            log.note("question about an image is not asked")
            continue
        choices: tuple[Any, ...] = tuple(row.get(f"choice_{letter}") for letter in "abcd")
        answer = _text(row, "answer").upper()
        asked = filled(row.get("data_id")) and filled(row.get("question"))
        if not (id and asked and all(map(filled, choices))):
            needs = "needs question_id, question, choice_a to choice_d, and a clip's file as data_id"
            log.add("missing fields", id=id, line=line, detail=needs)
            continue
        task = SEEDBENCH_TASKS[_known(part, SEEDBENCH_TASKS, "part of SEED-Bench", path)]
        segment = row.get("segment")
        if segment is not None and not (isinstance(segment, list) and len(segment) == 2):
            detail = f"segment must be a start and an end, got {segment!r:.60}"
            log.add("bad segment", id=id, line=line, detail=detail)
            continue
        bounds = dict(zip(("video_start", "video_end"), segment or (), strict=False))
        if part == 12 and all(type(value) in (int, float) and abs(value) < 1e15 for value in bounds.values()):
            bounds = {key: value / _BREAKFAST_FPS for key, value in bounds.items()}
        video = _cut(row["data_id"], bounds, id, line, log)
        if video is not None:
            text = "\n".join([row["question"], *map("{}. {}".format, "ABCD", choices)])
            yield Question(id, video, text, answer if answer in [*"ABCD"] else None, (task,), choices, line)


def _cut(name: str, bounds: dict[str, Any], id: str, line: int, log: SkipLog) -> Any:
    """`Question.video` with this name and segment. An impossible segment gives None and is counted."""
    try:
        clip = clip_of(Path(name), bounds)
    except ValueError as error:
        log.add("bad segment", id=id, line=line, detail=str(error))
        return None
    return name if isinstance(clip, Path) else clip


def _known(name: Any, names: Any, what: str, path: Path) -> Any:
    if not isinstance(name, (str, int)) or name not in names:
        listed = ", ".join(map(str, names))
        raise ValueError(f"--data {path}: {name!r} is no {what}; it must be one of {listed}")
    return name


def _document(path: Path) -> dict[str, Any]:
    """The json object of a whole file; empty for a list, json lines, parquet, or a missing file."""
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return whole if isinstance(whole, dict) else {}


def _text(row: Mapping[str, Any], key: str) -> str:
    """A name or number of a row as text; empty for any other value."""
    value = row.get(key)
    return str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def _first(row: Mapping[str, Any], *keys: str) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)
