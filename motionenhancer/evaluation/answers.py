"""Answers on disk: appended one by one, read again after a kill, or read from other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.clip import Clip
from ..data.question import video_stem
from ..data.skips import SkipLog
from ..data.video import VideoError, content_digest
from ..files import whole_file
from .judge import first_letter


def answers_file(process: int) -> str:
    """Name of the file to which one process of a run appends."""
    return f"answers-{process:05d}.jsonl"


def append_answers(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one line for each row; return only when the lines are on disk."""
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def mend_answers(path: Path) -> None:
    """Remove a half-written last line after a kill, so that the next line starts on its own."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def drop_answers(folder: Path, ids: Collection[str]) -> None:
    """Remove the answers of these ids from the files of all processes. Each file stays valid."""
    for path in folder.glob("answers*.jsonl") if ids else ():
        rows = list(read_lines(path))
        kept = [row for row in rows if row.get("id") not in ids]
        if len(kept) < len(rows):
            with whole_file(path) as temporary:
                append_answers(temporary, kept)


def mark_clip(video: Path | Clip) -> str:
    """The record of a clip in an answer: size, modification time, and digest of its bytes.

    Raises:
        OSError, VideoError: it cannot be read.
    """
    found = os.stat(video)
    return f"{found.st_size} {found.st_mtime_ns} {content_digest(video)}"


def is_marked(mark: object, video: Path | Clip) -> bool:
    """Whether a clip is still the clip of an answer. It is read again only if its time changed."""
    if not isinstance(mark, str):
        return True  # an answer that was written before clips were marked
    try:
        found = os.stat(video)
        untouched = mark.startswith(f"{found.st_size} {found.st_mtime_ns} ")
        return untouched or mark.endswith(f" {content_digest(video)}")
    except (OSError, VideoError):
        return False


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects that :func:`append_answers` wrote; half-written and unreadable lines are left out."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every process's answers, id to row; half-written and unreadable lines are ignored.

    A row is ``{"id", "output"}``, or ``{"id", "skipped": reason}``. For one id, an output replaces a skip;
    otherwise a later row replaces an earlier row.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        for row in read_lines(path):
            if not isinstance(row.get("id"), str):
                continue
            if "output" in row or ("skipped" in row and "output" not in rows.get(row["id"], {})):
                rows[row["id"]] = row
    return rows


def read_predictions(path: str | Path, log: SkipLog) -> dict[str, str]:
    """Read answers of another program: a json object from question id to output, or lines or a list of rows.

    A null output is an empty output. A clip's extension in an id is dropped, as in the ids of questions. If
    an id is given several times, the first output counts in which MotionBench's rule reads a letter A to D.
    If there is none, the last output counts. MotionBench's authors do the same.

    Args:
        path: the file; a row is ``{"id", "output"}``, as this package writes them, or ``{id: output}``.
        log: ids given twice are counted in its notes.

    Raises:
        ValueError: the file does not exist or is not json, or an output is not a text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--predictions must be a json or jsonl file, {path} does not exist")
    found: dict[str, str] = {}
    for row in _objects(path):
        keys = dict(row)
        if isinstance(keys.get("id"), str) and keys.keys() & {"output", "skipped"}:
            row = [] if "skipped" in keys else [(keys["id"], keys["output"])]
        for id, output in row:
            if output is not None and not isinstance(output, str):
                raise ValueError(f"--predictions {path}: the output of {id!r} must be a text")
            video, mark, index = id.strip().rpartition("#")
            name = f"{video_stem(video)}#{index}" if mark and index.isdecimal() else id.strip()
            if name in found:
                log.note("prediction given twice for one id")
                if first_letter(found[name]) in [*"ABCD"]:
                    continue
            found[name] = output or ""
    return found


def _objects(path: Path) -> list[list[tuple[str, Any]]]:
    """The json objects of a file, each as its pairs, so that no repeated key is lost."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--predictions {path}: not utf-8 at byte {error.start}") from None
    try:
        values = [json.loads(text, object_pairs_hook=_Pairs)]
    except (ValueError, RecursionError):
        try:
            values = [json.loads(line, object_pairs_hook=_Pairs) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--predictions {path}: neither json nor jsonl ({error})") from None
    if len(values) == 1 and type(values[0]) is list:
        values = values[0]
    if not all(isinstance(value, _Pairs) for value in values):
        raise ValueError(f"--predictions {path}: must map question ids to outputs")
    return values


class _Pairs(list[tuple[str, Any]]):
    """A json object as json.loads reads it."""
