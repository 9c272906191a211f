"""Subtitles of a clip at the times of its frames, put before a question as Video-MME's authors do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d{3})"
_SPAN = re.compile(rf"{_TIME}\s*-->\s*{_TIME}")
_BEFORE = "This video's subtitles are listed below:\n"
_NONE = "No subtitles available"
"""lmms-eval's text for a clip without subtitles; the authors give none."""


def with_subtitles(prompt: str, file: Path, timestamps: Iterable[float]) -> str:
    """Put the subtitles that are shown at some frame before a prompt.

    Args:
        prompt: the request without subtitles.
        file: an srt file, which does not exist if the clip has no subtitles.
        timestamps: times of the frames in seconds.

    Raises:
        ValueError: the file is not an srt file.
    """
    times = list(timestamps)
    lines = read_subtitles(file) if file.is_file() else []
    shown = [text for start, end, text in lines if any(start <= time < end for time in times)]
    return "\n".join([_BEFORE + ("\n".join(shown) or _NONE), prompt])


def read_subtitles(file: Path) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and text without tags, of each subtitle of an srt file.

    Raises:
        ValueError: a subtitle has no times, or the text is not utf-8.
    """
    found: list[tuple[float, float, str]] = []
    for block in re.split(r"\n\s*\n", file.read_bytes().decode("utf-8-sig").strip()):
        span = _SPAN.search(block)
        said = " ".join(re.sub(r"<[^>]*>", "", block[span.end() if span else 0 :]).split())
        if span is not None:
            parts = [int(part) for part in span.groups()]
            start, end = (h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in (parts[:4], parts[4:]))
            found.append((start, end, said))
        elif found:  # a blank line within a subtitle
            found[-1] = (*found[-1][:2], f"{found[-1][2]} {said}".strip())
        elif block:
            raise ValueError(f"--subtitles {file}: not an srt file, as it begins with {block[:40]!r}")
    return [line for line in found if line[2]]


def subtitles_digest(files: Sequence[Path]) -> str:
    """A sha256 of the names and bytes of the files that exist.

    Raises:
        ValueError: none of the files exists.
    """
    digest, there = hashlib.sha256(), [file for file in sorted(set(files)) if file.is_file()]
    if not there:
        folder, name = files[0].parent, files[0].name
        raise ValueError(f"--subtitles {folder} must hold srt files such as {name}; it has none")
    for file in there:
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
