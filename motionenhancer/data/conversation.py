"""Turn one decoded row of a data file into a sample, or say why it cannot be one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from motionenhancer.data.clip import CLIP_KEYS, Clip, clip_of
from motionenhancer.data.motion_sets import as_conversation
from motionenhancer.data.row_keys import TRAINED_KEYS, is_trained, refusal, video_keys
from motionenhancer.data.sample import Sample
from motionenhancer.data.skips import SkipLog

__all__ = ["BadSample", "convert"]

_TAG = re.compile(r"<(video|image)>")
#: Tags of ms-swift that stand for what is not shown here.
_FOREIGN_TAG = re.compile(r"<(?:audio|bbox|ref-object)>")
_FILE_ADDRESS = re.compile(r"file:(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
#: The rejected answer of a preference, of which the other one is learnt, as in MotionVid-QA.
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_ROW_KEYS = {"id", "video", "videos", "image", "images", "conversations", "messages", "system"}
#: Keys of a row that say what it is a case of, the first that is there.
_TASK_KEYS = ("task", "task_type", "question_type", "category")
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


class _File(NamedTuple):
    """A file as a row names it, and what it says of how the file is shown (see `CLIP_KEYS`)."""

    name: str
    said: dict[str, Any]


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _note_unknown(found: Mapping[str, Any], known: Collection[str], where: str, log: SkipLog) -> None:
    for key in found:
        if key not in known:
            log.note(f"unknown key {_short(where + str(key))} ignored")


def _check_keys(found: Mapping[str, Any], kind: str, where: str) -> None:
    if why := refusal(found, kind):
        raise BadSample("unsupported key", f"{where}{why}")


def _files(row: dict[str, Any], kind: str, log: SkipLog) -> list[_File] | None:
    """Return the files under ``kind`` or its plural; None when the row has neither key."""
    keys = [key for key in (kind, kind + "s") if row.get(key) is not None]
    if not keys:
        return None
    if len(keys) == 2:
        raise BadSample("missing fields", f"both {keys[0]!r} and {keys[1]!r} are given")
    value = row[keys[0]]
    found = []
    for entry in value if isinstance(value, list) else [value]:
        said = {}
        if isinstance(entry, dict):
            said = _said(entry, kind, f"{keys[0]}.", {"path", "bytes"}, log)
            entry = entry.get("path")
        if not isinstance(entry, str) or not entry.strip():
            raise BadSample("missing fields", f"{keys[0]!r} must hold file names, got {_short(value)}")
        found.append(_File(entry, said))
    return found


def _said(
    found: Mapping[str, Any], kind: str, where: str, known: Collection[str], log: SkipLog
) -> dict[str, Any]:
    """What a part, or a file's entry, says of how its video is shown; keys beside ``known`` are noted."""
    _check_keys(found, kind, where)
    video = kind == "video"
    _note_unknown(found, {*known, *(CLIP_KEYS if video else ())}, where, log)
    return video_keys(found) if video else {}


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at its tags into parts; whitespace around tags is dropped."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample("invalid text", f"half a surrogate pair at character {error.start}") from None
    if foreign := _FOREIGN_TAG.search(text):
        raise BadSample("unsupported tag", f"{foreign.group()} stands for nothing that is shown here")
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_TAG.split(text)):
        if i % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _parts(content: Any, named: dict[str, list[_File]], where: str, log: SkipLog) -> list[dict[str, Any]]:
    """Normalise a message's content; files that its parts carry are added to ``named``."""
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadSample("missing fields", f"{where} must be a text or a list of parts, got {_short(content)}")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts += _split(part)
            continue
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        known = kind == "text" and isinstance(part.get("text"), str)
        if not known and kind not in ("video", "image"):
            raise BadSample("missing fields", f"{where} holds a part of no known type: {_short(part)}")
        said = _said(part, kind, "content.", _PART_KEYS, log)
        if kind == "text":
            parts += _split(part["text"])
            continue
        parts.append({"type": kind})
        if part.get(kind) is not None:
            if not isinstance(part[kind], str):
                raise BadSample("missing fields", f"{where}: {kind} must be a file name, got {_short(part)}")
            named[kind].append(_File(part[kind], said))
        elif said:
            raise BadSample("unsupported key", f"{where}: {min(said)!r} stands in a part without its video")
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


def _messages(row: dict[str, Any], named: dict[str, list[_File]], log: SkipLog) -> list[dict[str, Any]]:
    form, turns = _turns(row)
    who, what = ("from", "value") if form == "conversations" else ("role", "content")
    messages: list[dict[str, Any]] = []
    if row.get("system") and not (isinstance(row["system"], str) and not row["system"].strip()):
        messages.append({"role": "system", "content": _parts(row["system"], named, "system", log)})
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or who not in turn or what not in turn:
            raise BadSample(
                "missing fields", f"{form}[{i}] must have {who!r} and {what!r}, got {_short(turn)}"
            )
        role = _ROLES.get(turn[who]) if isinstance(turn[who], str) else None
        if role is None:
            raise BadSample("wrong roles", f"{form}[{i}] is from {_short(turn[who])}")
        _check_keys(turn, "turn", f"{form}[{i}].")
        known = {*_TURN_KEYS, *(TRAINED_KEYS if role == "assistant" else ())}
        _note_unknown(turn, known, f"{form}.", log)
        parts = _parts(turn[what], named, f"{form}[{i}].{what}", log)
        message: dict[str, Any] = {"role": role, "content": parts}
        if _is_left_out(turn, role, f"{form}[{i}]"):
            message["loss"] = False
        messages.append(message)
    return messages


def _is_left_out(turn: dict[str, Any], role: str, where: str) -> bool:
    """Whether a turn is an answer that is not to be trained on."""
    try:
        trained = is_trained(turn)
    except ValueError as error:
        raise BadSample("unsupported key", f"{where}: {error}") from None
    if trained and role != "assistant":
        raise BadSample("unsupported key", f"{where}: only answers are trained on, this is the {role}'s")
    return trained is False and role == "assistant"


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
    if all(message.get("loss") is False for message in messages if message["role"] == "assistant"):
        raise BadSample("no trained answer", "every answer is left out of the loss")


def _read_image_tags(messages: list[dict[str, Any]], files: dict[str, list[_File]]) -> None:
    """Take ``<image>`` for ``<video>`` where a row has videos only, as LLaVA-Video-178K writes it."""
    media = [part for m in messages for part in m["content"] if part["type"] != "text"]
    if files["video"] and not files["image"] and all(part["type"] == "image" for part in media):
        for part in media:
            part["type"] = "video"


def _match(kind: str, tags: int, listed: list[_File] | None, inline: list[_File]) -> list[_File]:
    """Return the files of ``kind`` in the order of their tags, or say how tags and files disagree."""
    if inline and listed is not None:
        raise BadSample("tag count differs", f"{kind} files both in the messages and beside them")
    files = inline if listed is None else listed
    if tags == len(files):
        return files
    if tags == 0 and kind == "video":
        raise BadSample("no <video> tag", f"{len(files)} video(s) given")
    raise BadSample("tag count differs", f"{tags} <{kind}> tag(s) for {len(files)} {kind}(s)")


def _locate(
    kind: str, files: list[_File], root: Path, check: bool, whole: Mapping[str, Any]
) -> tuple[Path | Clip, ...]:
    """Find files below the root; ``whole`` is what the row itself says of its one video."""
    if whole and len(files) != 1:
        raise BadSample("unsupported key", f"{min(whole)!r} of a row with {len(files)} videos")
    located: list[Path | Clip] = []
    for name, said in files:
        path = root / name
        try:
            path = root / _local(name)
            there = not check or path.is_file()
        except (OSError, ValueError):
            there = False
        if "://" in name and not _FILE_ADDRESS.match(name):
            raise BadSample(f"missing {kind} file", f"{_short(name, 120)} is an address; only files are read")
        if not there:
            raise BadSample(f"missing {kind} file", _short(str(path), 200))
        if both := [key for key in whole if said.get(key, whole[key]) != whole[key]]:
            raise BadSample("unsupported key", f"{both[0]!r} of the row and of its video differ")
        try:
            located.append(clip_of(path, {**whole, **said}))
        except ValueError as error:
            raise BadSample("unsupported key", str(error)) from None
    # A processor takes the videos of a sample together.
    limits = {(v.min_pixels, v.max_pixels) if isinstance(v, Clip) else (None, None) for v in located}
    if len(limits) > 1:
        raise BadSample(
            "unsupported key", "the videos of one row must have the same min_pixels and max_pixels"
        )
    return tuple(located)


def _local(name: str) -> str:
    """The path of a ``file:`` address, its percent signs decoded; any other name as it is."""
    address = _FILE_ADDRESS.match(name)
    return os.fsdecode(unquote_to_bytes(name[address.end() :])) if address else name


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

    Args:
        row: as decoded from json.
        line, offset: where it starts in the data file: its 1-based line and its first byte.
        root: what relative paths are relative to.
        log: counts unknown keys in its notes.
        require_video: refuse a row without any video.
        check_files: refuse a row whose files are not there.

    Raises:
        BadSample: with the reason why the row cannot be used.
    """
    if not isinstance(row, dict):
        raise BadSample("missing fields", f"must be an object with fields, got {_short(row)}")
    given = row.get("id")
    name = f"line-{line}" if given is None or given == "" else str(given)
    try:
        row = as_conversation(row) or row
        _check_keys(row, "row", "")
        whole = video_keys(row, row=True)
        _note_unknown(row, {*_ROW_KEYS, *_TASK_KEYS, *_REJECTED, *(CLIP_KEYS.keys() - {"fps"})}, "", log)
        if any(row.get(key) is not None for key in _REJECTED):
            log.note("rejected answer of a preference not read")
        named: dict[str, list[_File]] = {"video": [], "image": []}
        listed = {kind: _files(row, kind, log) for kind in named}
        messages = _messages(row, named, log)
        _read_image_tags(messages, {kind: [*(listed[kind] or []), *named[kind]] for kind in named})
        _check_roles(messages)
        located: dict[str, tuple[Any, ...]] = {}
        for kind in named:
            tags = sum(part["type"] == kind for m in messages for part in m["content"])
            files = _match(kind, tags, listed[kind], named[kind])
            if kind == "video" and require_video and not files:
                raise BadSample("no video", "neither a video nor a <video> tag")
            located[kind] = _locate(kind, files, root, check_files, whole if kind == "video" else {})
    except BadSample as bad:
        raise BadSample(bad.reason, bad.detail, name) from None
    task = next((row[key] for key in _TASK_KEYS if isinstance(row.get(key), str)), "")
    return Sample(name, messages, located["video"], located["image"], line, offset, task)
