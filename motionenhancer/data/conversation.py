"""Turn one decoded row of a data file into a sample, or say why it cannot be one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from motionenhancer.data.motion_sets import as_conversation
from motionenhancer.data.sample import Sample
from motionenhancer.data.skips import SkipLog

__all__ = ["BadSample", "convert"]

_TAG = re.compile(r"<(video|image)>")
_ROW_KEYS = {"id", "video", "videos", "image", "images", "conversations", "messages"}
_TURN_KEYS = {"from", "value", "role", "content"}
_PART_KEYS = {"type", "text", "video", "image"}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadSample(Exception):
    """A row that cannot be used: ``reason`` is a fixed phrase, ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str = "", id: str = "") -> None:
        super().__init__(reason, detail, id)
        self.reason, self.detail, self.id = reason, detail, id


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _note_unknown(found: dict[str, Any], known: set[str], where: str, log: SkipLog) -> None:
    for key in found:
        if key not in known:
            log.note(f"unknown key {_short(where + str(key))} ignored")


def _files(row: dict[str, Any], kind: str) -> list[str] | None:
    """Return the paths under ``kind`` or its plural; None when the row has neither key."""
    keys = [key for key in (kind, kind + "s") if row.get(key) is not None]
    if not keys:
        return None
    if len(keys) == 2:
        raise BadSample("missing fields", f"both {keys[0]!r} and {keys[1]!r} are given")
    value = row[keys[0]]
    found = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            entry = entry.get("path")
        if not isinstance(entry, str) or not entry.strip():
            raise BadSample("missing fields", f"{keys[0]!r} must hold file names, got {_short(value)}")
        found.append(entry)
    return found


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at its tags into parts; whitespace around tags is dropped."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample("invalid text", f"half a surrogate pair at character {error.start}") from None
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_TAG.split(text)):
        if i % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _parts(content: Any, named: dict[str, list[str]], where: str, log: SkipLog) -> list[dict[str, Any]]:
    """Normalise a message's content; paths that its parts carry are added to ``named``."""
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadSample("missing fields", f"{where} must be a text or a list of parts, got {_short(content)}")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts += _split(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"])
        elif kind in ("video", "image"):
            parts.append({"type": kind})
            if part.get(kind) is not None:
                if not isinstance(part[kind], str):
                    raise BadSample(
                        "missing fields", f"{where}: {kind} must be a file name, got {_short(part)}"
                    )
                named[kind].append(part[kind])
        else:
            raise BadSample("missing fields", f"{where} holds a part of no known type: {_short(part)}")
        _note_unknown(part, _PART_KEYS, "content.", log)
    return parts


def _turns(row: dict[str, Any]) -> tuple[str, list[Any]]:
    has = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(has) != 1:
        found = "both" if has else "neither"
        raise BadSample("missing fields", f"must have 'conversations' or 'messages', has {found}")
    turns = row[has[0]]
    if not isinstance(turns, list) or not turns:
        raise BadSample("missing fields", f"{has[0]!r} must be a list of turns, got {_short(turns)}")
    return has[0], turns


def _messages(row: dict[str, Any], named: dict[str, list[str]], log: SkipLog) -> list[dict[str, Any]]:
    form, turns = _turns(row)
    who, what = ("from", "value") if form == "conversations" else ("role", "content")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or who not in turn or what not in turn:
            raise BadSample(
                "missing fields", f"{form}[{i}] must have {who!r} and {what!r}, got {_short(turn)}"
            )
        _note_unknown(turn, _TURN_KEYS, f"{form}.", log)
        role = _ROLES.get(turn[who]) if isinstance(turn[who], str) else None
        if role is None:
            raise BadSample("wrong roles", f"{form}[{i}] is from {_short(turn[who])}")
        parts = _parts(turn[what], named, f"{form}[{i}].{what}", log)
        messages.append({"role": role, "content": parts})
    return messages


def _check_roles(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(talk) // 2)
    if not talk or talk != expected:
        raise BadSample(
            "wrong roles",
            "must be user, assistant in turns after at most one system, got " + ", ".join(roles),
        )
    for i, message in enumerate(messages):
        kinds = {part["type"] for part in message["content"]}
        if message["role"] != "user" and kinds - {"text"}:
            tag = min(kinds - {"text"})
            raise BadSample("misplaced tag", f"<{tag}> in a text of the {message['role']}, message {i}")
        if "text" not in kinds and message["role"] != "system":
            raise BadSample("empty text", f"message {i} of the {message['role']}")


def _match(kind: str, tags: int, listed: list[str] | None, inline: list[str]) -> list[str]:
    """Return the files of ``kind`` in the order of their tags, or say how tags and files disagree."""
    if inline and listed is not None:
        raise BadSample("tag count differs", f"{kind} files both in the messages and beside them")
    files = inline if listed is None else listed
    if tags == len(files):
        return files
    if tags == 0 and kind == "video":
        raise BadSample("no <video> tag", f"{len(files)} video(s) given")
    raise BadSample("tag count differs", f"{tags} <{kind}> tag(s) for {len(files)} {kind}(s)")


def _locate(kind: str, names: list[str], root: Path, check: bool) -> tuple[Path, ...]:
    paths = []
    for name in names:
        if "://" in name:
            raise BadSample(f"missing {kind} file", f"{_short(name, 120)} is an address; only files are read")
        path = root / name
        try:
            there = not check or path.is_file()
        except (OSError, ValueError):
            there = False
        if not there:
            raise BadSample(f"missing {kind} file", _short(str(path), 200))
        paths.append(path)
    return tuple(paths)


def convert(
    row: Any,
    line: int,
    root: Path,
    log: SkipLog,
    *,
    offset: int = 0,
    require_video: bool = True,
    check_files: bool = True,
) -> Sample:
    """Turn a decoded row into a :class:`Sample`.

    Raises
    ------
    BadSample: with the reason why the row cannot be used.
    """
    if not isinstance(row, dict):
        raise BadSample("missing fields", f"must be an object with fields, got {_short(row)}")
    given = row.get("id")
    name = f"line-{line}" if given is None or given == "" else str(given)
    try:
        row = as_conversation(row) or row
        _note_unknown(row, _ROW_KEYS, "", log)
        named: dict[str, list[str]] = {"video": [], "image": []}
        listed = {kind: _files(row, kind) for kind in named}
        messages = _messages(row, named, log)
        _check_roles(messages)
        located = {}
        for kind in named:
            tags = sum(part["type"] == kind for m in messages for part in m["content"])
            files = _match(kind, tags, listed[kind], named[kind])
            if kind == "video" and require_video and not files:
                raise BadSample("no video", "neither a video nor a <video> tag")
            located[kind] = _locate(kind, files, root, check_files)
    except BadSample as bad:
        raise BadSample(bad.reason, bad.detail, name) from None
    return Sample(name, messages, located["video"], located["image"], line, offset)
