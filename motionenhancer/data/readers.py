"""Stream samples from json and jsonl files: LLaVA, messages+videos, MotionBench-Train, MotionVid-QA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from motionenhancer.data.conversation import BadSample, convert
from motionenhancer.data.sample import Sample
from motionenhancer.data.skips import SkipLog

__all__ = ["read_samples"]

_Row = tuple[int, Any, str]
"""Line number, decoded value, and an error text that is empty when the value is good."""


def _decode(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not utf-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return None, f"{error.msg} at column {error.colno}"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:
        return None, str(error)


def _lines(file: BinaryIO) -> Iterator[_Row]:
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            yield number, *_decode(line)


def _array(file: BinaryIO) -> Iterator[_Row]:
    """Yield the elements of a top-level array with the lines they start on, up to a broken one."""
    raw = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield raw.count(b"\n", 0, error.start) + 1, None, f"not utf-8 at byte {error.start}; nothing was read"
        return
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0

    def skip_space(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    at = skip_space(at)
    while at < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, None, f"{error.msg} at column {error.colno}; the rest of the array is lost"
            return
        except (RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            yield line, None, f"{why}; the rest of the array is lost"
            return
        yield line, value, ""
        at = skip_space(at)
        if at < len(text) and text[at] == ",":
            at = skip_space(at + 1)
        elif at < len(text) and text[at] != "]":
            where = line + text.count("\n", counted, at)
            yield where, None, "no comma between elements; the rest of the array is lost"
            return
    if at >= len(text):
        yield text.count("\n") + 1, None, "the array is not closed"
    elif text[at + 1 :].strip():
        yield line + text.count("\n", counted, at), None, "text after the end of the array"


def _is_array(file: BinaryIO) -> bool:
    """Tell one top-level array from lines, the first of which may be an array by mistake."""
    filled = (line for line in (raw.removeprefix(b"\xef\xbb\xbf").strip() for raw in file) if line)
    first = next(filled, b"")
    if not first.startswith(b"["):
        return False
    return next(filled, None) is None or bool(_decode(first)[1])


def _rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        array = _is_array(file)
        file.seek(0)
        yield from _array(file) if array else _lines(file)


def _stream(path: Path, root: Path, log: SkipLog, require_video: bool) -> Iterator[Sample]:
    usable = 0
    for line, value, problem in _rows(path):
        if problem:
            log.add("invalid json", line=line, detail=problem)
            continue
        try:
            sample = convert(value, line, root, log, require_video=require_video)
        except BadSample as bad:
            log.add(bad.reason, id=bad.id, line=line, detail=bad.detail)
            continue
        usable += 1
        yield sample
    if not usable:
        first = "\n".join(f"  {entry}" for entry in log.entries[:5]) or "  the file holds no sample"
        raise ValueError(
            f"no usable sample in {path}; {log.summary(examples=0)}; the first reasons:\n{first}"
        )


def read_samples(
    path: str | Path,
    video_root: str | Path | None = None,
    on_skip: SkipLog | None = None,
    *,
    require_video: bool = True,
) -> Iterator[Sample]:
    """Stream the samples of a data file; count and report those that cannot be used.

    Four forms, told apart by their keys, line by line:

    - LLaVA: ``{"id", "video": str or list, "image"?, "conversations": [{"from": "human" | "gpt" | "system",
      "value": "<video>\\n..."}]}``
    - messages: ``{"id"?, "messages": [{"role", "content": str with <video> tags or list of parts}],
      "videos": [...]}``; a part ``{"type": "video", "video": path}`` may name its file itself
    - MotionBench-Train: ``{"video_path", "motion_caption"}``, with a question of our own
    - MotionVid-QA: ``{"video", "question", "chosen", "rejected"}``, of which the rejected answer is left out,
      or ``{"video", "question", "answer"}``

    A jsonl file is read a line at a time and never held in memory; a file that is one json array is loaded.

    Parameters
    ----------
    path: the data file, utf-8.
    video_root: what relative paths of videos and images are relative to; the data file's folder by default.
    on_skip: where skipped lines are counted, by line, id and reason; unknown keys are counted in its notes.
    require_video: leave out samples without any video.

    Raises
    ------
    ValueError: at the call, a data file or video_root that is not there; at the end of the iteration, a file
        without a single usable sample, with the first reasons.

    >>> import tempfile
    >>> from motionenhancer.toy.world import write_world
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     toy = write_world(folder, clips=2, progress=False)
    ...     [sample.id for sample in read_samples(toy.train, toy.videos)]
    ['train-00000-caption', 'train-00001-motion']
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"path must be a json or jsonl file, {path} {what}")
    root = path.parent if video_root is None else Path(video_root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"video_root must be a folder, {root} {what}")
    return _stream(path, root, SkipLog() if on_skip is None else on_skip, require_video)
