"""Turn one decoded row of a data file into a sample, or count why it is skipped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from .clip import CLIP_KEYS, Clip, clip_of, is_file
from .motion_sets import as_conversation
from .sample import Sample
from .skips import SkipLog

_TAG = re.compile(r"<(video|image)>")
#: Tags of ms-swift for media that are not shown here.
_FOREIGN_TAG = re.compile(r"<(?:audio|bbox|ref-object)>")
_INDEX = re.compile(r"\[\d+\]")
_FILE_ADDRESS = re.compile(r"file:(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
#: The rejected answer of a preference, of which the other one is learnt, as in MotionVid-QA.
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
#: Keys of a row that may name its task; the first one present counts.
_TASK_KEYS = ("task", "task_type", "question_type", "category")
#: Keys of a row's one video that the row may hold. Not `fps`: data sets write the file's own rate there.
_ROW_CLIP_KEYS = tuple(key for key in CLIP_KEYS if key != "fps")
_ROW_KEYS = {"id", "video", "videos", "image", "images", "conversations", "messages", "system", *_REJECTED}
_ROW_KEYS |= {*_TASK_KEYS, "regions"}
_TURN_KEYS = {"from", "value", "role", "content"}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

#: Whether an answer is trained on: ms-swift and XTuner; axolotl; OpenAI; slime.
_TRAINED_KEYS = ("loss", "train", "training", "weight", "loss_mask", "loss_scale")

_TOOLS = "tools are not shown to the model"
_WEIGHT = "every sample has the same weight; repeat or remove samples instead"
_WHOLE = "an answer is trained on whole or not at all"
_SOUND = "sound is not shown to the model"
_BOXES = "boxes are not put into texts; write their numbers into the text"
_FILES = "put a turn's files beside the messages or into the parts of its content"
_THOUGHT = "hidden reasoning is not shown; write it into the content"
_UNWANTED = "marks an unwanted answer, which must not be learnt"
_SIZES = ("resized_height", "resized_width", "total_pixels")
_VIDEO = {
    **dict.fromkeys(_SIZES, "give min_pixels and max_pixels instead"),
    **dict.fromkeys(("start", "end"), "give video_start and video_end, in seconds"),
}

#: Where a key stands (a row, a turn, or a part) → key that would change what is learnt → why it is refused.
_REFUSED: dict[str, dict[str, str]] = {
    "row": {
        **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_scale", "loss", "train"), _WEIGHT),
        **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("label", "kto_tag"), _UNWANTED),
        "objects": _BOXES,
        "history": "put earlier turns into the conversation",
        **_VIDEO,
    },
    "turn": {
        **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call"), _TOOLS),
        **dict.fromkeys(("image", "images", "video", "videos"), _FILES),
        **dict.fromkeys(("audio", "audios"), _SOUND),
        **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _THOUGHT),
        **dict.fromkeys(("train_detail", "training_detail"), _WHOLE),
    },
    "video": _VIDEO,
    "image": dict.fromkeys((*_SIZES, "min_pixels", "max_pixels"), "only the processor resizes images"),
    "text": dict.fromkeys(_TRAINED_KEYS, _WHOLE),
}
#: Values of a refused key that change nothing.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    _WEIGHT: lambda value: value == 1,
    _WHOLE: lambda value: value == 1,
    _UNWANTED: lambda value: value is not False,  # any other label describes the clip or a wanted answer
    _SOUND: lambda value: isinstance(value, bool),  # only says whether there is sound
    # Boxes as ms-swift gives them; a list of objects describes the clip.
    _BOXES: lambda value: not (isinstance(value, dict) and value.keys() & {"ref", "bbox"}),
}


class _BadSample(Exception):
    """A row that cannot be used; its arguments are a fixed phrase, and what was found."""


class _File(NamedTuple):
    """A file that a row names, and the row's keys for how to show it (see `CLIP_KEYS`)."""

    name: str
    said: dict[str, Any]


def convert(
    row: Any,
    line: int,
    root: Path,
    log: SkipLog,
    *,
    offset: int = 0,
    require_video: bool = True,
    check_files: bool = True,
) -> Sample | None:
    """Turn a decoded row into a `Sample`. A row that cannot be used gives None and is counted in `log`.

    Args:
        row: as decoded from json.
        line, offset: start of the row in the data file: 1-based line and byte offset.
        root: folder of relative paths.
        log: counts the row if it is skipped; its notes count unknown keys.
        require_video: refuse a row without a video.
        check_files: refuse a row whose files do not exist.
    """
    name = ""
    try:
        if not isinstance(row, dict):
            raise _BadSample("missing fields", f"must be an object with fields, got {_short(row)}")
        name = f"line-{line}" if row.get("id") in (None, "") else str(row["id"])
        row = as_conversation(row) or row
        whole = _check_keys(row, "row", _ROW_KEYS, "", log)
        if any(row.get(key) is not None for key in _REJECTED):
            log.note("rejected answer of a preference pair, not read")
        listed = {kind: _listed_files(row, kind, log) for kind in ("video", "image")}
        inline: dict[str, list[_File]] = {"video": [], "image": []}
        messages = _messages(row, inline, log)
        files = {kind: listed[kind] or inline[kind] for kind in inline}
        media = [part for message in messages for part in message["content"] if part["type"] != "text"]
        if files["video"] and not files["image"] and all(part["type"] == "image" for part in media):
            for part in media:  # LLaVA-Video-178K writes <image> beside a video.
                part["type"] = "video"
        _check_roles(messages)
        for kind in files:
            if inline[kind] and listed[kind] is not None:
                raise _BadSample("tag count differs", f"has {kind} files both in and beside the messages")
            tags, count = sum(part["type"] == kind for part in media), len(files[kind])
            if tags == 0 < count and kind == "video":
                raise _BadSample("no <video> tag", f"{count} video(s), but no <video> in the messages")
            if tags != count:
                raise _BadSample("tag count differs", f"{tags} <{kind}> tag(s) for {count} {kind}(s)")
        if require_video and not files["video"]:
            raise _BadSample("no video", "neither a video nor a <video> tag")
        videos = _locate("video", files["video"], root, check_files, whole)
        images: tuple[Any, ...] = _locate("image", files["image"], root, check_files, {})
    except _BadSample as bad:
        reason, detail = bad.args
        log.add(reason, id=name, line=line, detail=detail)
        return None
    task = next((row[key] for key in _TASK_KEYS if isinstance(row.get(key), str)), "")
    regions = row.get("regions") or ()
    if not isinstance(regions, list | tuple):
        log.note("regions ignored: they must be a list")
        regions = ()
    return Sample(name, messages, videos, images, line, offset, task, tuple(regions))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_keys(
    found: Mapping[str, Any], kind: str, known: Collection[str], where: str, log: SkipLog
) -> dict[str, Any]:
    """Refuse unsupported keys and note unknown keys; return the keys about a video's frames.

    None and empty values count as not given.
    """
    for key, why in _REFUSED[kind].items():
        value = found.get(key)
        given = value is not None and value not in ("", [], {})
        if given and not (why in _HARMLESS and _HARMLESS[why](value)):
            raise _BadSample("unsupported key", f"{where}{key!r}: {why}")
    clip_keys = {"row": _ROW_CLIP_KEYS, "video": CLIP_KEYS}.get(kind, ())
    for key in found:
        if key not in known and key not in clip_keys:
            log.note(f"unknown key {_short(_INDEX.sub('', where) + str(key))} ignored")
    return {key: found[key] for key in clip_keys if found.get(key) is not None}


def _listed_files(row: dict[str, Any], kind: str, log: SkipLog) -> list[_File] | None:
    """Return the files under the key `kind` or its plural; None if the row has neither key."""
    keys = [key for key in (kind, kind + "s") if row.get(key) is not None]
    if not keys:
        return None
    if len(keys) == 2:
        raise _BadSample("missing fields", f"{keys[0]!r} and {keys[1]!r} exclude each other")
    value = row[keys[0]]
    found = []
    for entry in value if isinstance(value, list) else [value]:
        said = {}
        if isinstance(entry, dict):
            said = _check_keys(entry, kind, {"path", "bytes"}, f"{keys[0]}.", log)
            entry = entry.get("path")
        if not isinstance(entry, str) or not entry.strip():
            raise _BadSample("missing fields", f"{keys[0]!r} must hold file names, got {_short(value)}")
        found.append(_File(entry, said))
    return found


def _messages(row: dict[str, Any], inline: dict[str, list[_File]], log: SkipLog) -> list[dict[str, Any]]:
    has = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if len(has) != 1:
        found = "both" if has else "neither"
        raise _BadSample("missing fields", f"must have 'conversations' or 'messages', has {found}")
    form, turns = has[0], row[has[0]]
    if not isinstance(turns, list) or not turns:
        raise _BadSample("missing fields", f"{form!r} must be a list of turns, got {_short(turns)}")
    who, what = ("from", "value") if form == "conversations" else ("role", "content")
    messages: list[dict[str, Any]] = []
    system = row.get("system")
    if system and not (isinstance(system, str) and not system.strip()):
        messages.append({"role": "system", "content": _parts(system, inline, "system", log)})
    for i, turn in enumerate(turns):
        where = f"{form}[{i}]"
        if not isinstance(turn, dict) or who not in turn or what not in turn:
            raise _BadSample("missing fields", f"{where} must have {who!r} and {what!r}, got {_short(turn)}")
        role = _ROLES.get(turn[who]) if isinstance(turn[who], str) else None
        if role is None:
            raise _BadSample("wrong roles", f"{where} has the unknown role {_short(turn[who])}")
        known = {*_TURN_KEYS, *(_TRAINED_KEYS if role == "assistant" else ())}
        _check_keys(turn, "turn", known, f"{where}.", log)
        content = _parts(turn[what], inline, f"{where}.{what}", log)
        message: dict[str, Any] = {"role": role, "content": content}
        trained = _is_trained(turn, where)
        if trained and role != "assistant":
            raise _BadSample(
                "unsupported key", f"{where}: only turns of the assistant are trained on, got the {role}'s"
            )
        if trained is False and role == "assistant":
            message["loss"] = False
        messages.append(message)
    return messages


def _is_trained(turn: Mapping[str, Any], where: str) -> bool | None:
    """Whether a turn is marked as trained; None if it has no mark."""
    said = {key: turn[key] for key in _TRAINED_KEYS if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            wanted = f"{where}: {key!r} must be true or false, 1 or 0, got {value!r}"
            raise _BadSample("unsupported key", wanted)
    if len(set(said.values())) > 1:
        raise _BadSample("unsupported key", f"{where}: {' and '.join(map(repr, said))} contradict each other")
    return bool(next(iter(said.values()))) if said else None


def _parts(content: Any, inline: dict[str, list[_File]], where: str, log: SkipLog) -> list[dict[str, Any]]:
    """Normalise a message's content; files named in its parts are added to `inline`."""
    if not isinstance(content, (str, list)):
        raise _BadSample("missing fields", f"{where} must be a text or list of parts, got {_short(content)}")
    parts: list[dict[str, Any]] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("video", "image") and not (kind == "text" and isinstance(part.get("text"), str)):
            raise _BadSample("missing fields", f"{where} has a part of unknown type: {_short(part)}")
        said = _check_keys(part, kind, {"type", "text", "video", "image"}, "content.", log)
        if kind == "text":
            parts += _split(part["text"])
            continue
        parts.append({"type": kind})
        if part.get(kind) is not None:
            if not isinstance(part[kind], str):
                raise _BadSample("missing fields", f"{where}: {kind} must be a file name, got {_short(part)}")
            inline[kind].append(_File(part[kind], said))
        elif said:
            raise _BadSample("unsupported key", f"{where}: {min(said)!r} is in a part that names no video")
    return parts


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at its tags into parts; whitespace around tags is dropped."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadSample("invalid text", f"half a surrogate pair at character {error.start}") from None
    if foreign := _FOREIGN_TAG.search(text):
        raise _BadSample("unsupported tag", f"{foreign.group()}: only images and videos are shown")
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_TAG.split(text)):
        if i % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _check_roles(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[0] == "system" else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        expected = "must be at most one system, then user and assistant in turns"
        raise _BadSample("wrong roles", f"{expected}, got {', '.join(roles)}")
    for i, message in enumerate(messages):
        kinds = {part["type"] for part in message["content"]}
        if message["role"] != "user" and kinds - {"text"}:
            tag = min(kinds - {"text"})
            raise _BadSample("misplaced tag", f"<{tag}> in a text of the {message['role']}, message {i}")
        if "text" not in kinds and message["role"] != "system":
            raise _BadSample("empty text", f"message {i} of the {message['role']}")
    if all(message.get("loss") is False for message in messages if message["role"] == "assistant"):
        raise _BadSample("no trained answer", "every answer is left out of the loss")


def _locate(
    kind: str, files: list[_File], root: Path, check: bool, whole: Mapping[str, Any]
) -> tuple[Path | Clip, ...]:
    """Find files below the root. `whole` holds the video keys of the row itself."""
    if whole and len(files) != 1:
        raise _BadSample("unsupported key", f"{min(whole)!r} is given for a row with {len(files)} videos")
    located: list[Path | Clip] = []
    for name, said in files:
        if address := _FILE_ADDRESS.match(name):
            place = os.fsdecode(unquote_to_bytes(name[address.end() :].encode("utf-8", "surrogatepass")))
        elif "://" in name:
            detail = f"{_short(name, 120)} is an address; only files are read"
            raise _BadSample(f"missing {kind} file", detail)
        else:
            place = name
        path = root / place
        if check and not is_file(path):
            raise _BadSample(f"missing {kind} file", _short(str(path), 200))
        if both := [key for key in whole if said.get(key, whole[key]) != whole[key]]:
            raise _BadSample("unsupported key", f"{both[0]!r} of the row differs from that of its video")
        try:
            located.append(clip_of(path, {**whole, **said}))
        except ValueError as error:
            raise _BadSample("unsupported key", str(error)) from None
    # A processor takes the videos of a sample together.
    if len({(v.min_pixels, v.max_pixels) if isinstance(v, Clip) else (None, None) for v in located}) > 1:
        detail = "the videos of one row must have the same min_pixels and max_pixels"
        raise _BadSample("unsupported key", detail)
    return tuple(located)
