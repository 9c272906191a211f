"""LLaMA-Factory's data sets: entries of a `dataset_info.json`, and rows in the alpaca form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from .rows import Row

INFO = "dataset_info.json"

#: Columns of the alpaca form, by what they hold, where an entry names none.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
#: Columns of either form, and the keys that rows have for them here.
_SHARED = {"system": "system", "tools": "tools", "images": "images", "videos": "videos", "audios": "audios"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
_KEPT = ("id", "task", "task_type", "question_type", "category")
_ENTRY = {"file_name", "hf_hub_url", "revision", "split", "formatting", "columns", "tags", "ranking"}


@dataclass(frozen=True)
class Entry:
    """A data set of a `dataset_info.json`.

    Attributes:
        data: its file or its Hub id.
        alpaca: whether its rows have an instruction and an output instead of a list of turns.
        columns, tags: the names of its columns and of the keys and roles of its turns.
    """

    data: str
    alpaca: bool
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    def row(self, row: Row) -> Row:
        """Return the row with `messages`. A value that is not an object is returned unchanged."""
        if not isinstance(row.value, dict):
            return row
        given, columns = row.value, self.columns
        found = {key: given[key] for key in _KEPT if key in given}
        found |= {key: given[columns[name]] for name, key in _SHARED.items() if columns.get(name) in given}
        if self.alpaca:
            found["messages"] = alpaca_messages(given, columns)
        else:
            turns = given.get(columns["messages"])
            found["messages"] = [*map(self._turn, turns)] if isinstance(turns, list) else turns
        return row._replace(value=found)

    def _turn(self, turn: Any) -> Any:
        tags = self.tags
        if not isinstance(turn, dict) or not {tags["role_tag"], tags["content_tag"]} <= turn.keys():
            return turn
        roles = {tags[tag]: role for tag, role in _ROLES.items()}
        rest = dict(turn)
        content, said = rest.pop(tags["content_tag"]), rest.pop(tags["role_tag"])
        return {**rest, "role": roles.get(said, said) if isinstance(said, str) else said, "content": content}


def read_entry(file: Path, name: str) -> Entry:
    """The entry `name` of a `dataset_info.json`. The name may be empty if there is only one entry.

    Raises:
        ValueError: the file or entry does not exist, or the entry has an unsupported key, which is named.
    """
    try:
        entries = read_json(file)
    except OSError as error:
        raise ValueError(f"{file}: not a readable list of data sets ({error})") from error
    if not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{file}: must map names to data sets")
    if not name and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        raise ValueError(f"{file}: give {INFO}:NAME, where NAME is one of {', '.join(entries)}")
    entry, where = entries[name], f"{file}, {name!r}"
    form = entry.get("formatting", "alpaca")
    if form not in ("alpaca", "sharegpt"):
        raise ValueError(f"{where}: formatting must be alpaca or sharegpt, got {form!r}")
    if entry.get("ranking"):
        raise ValueError(f"{where}: ranking must not be true: training on preferences is not supported")
    known = {*_SHARED, *((*_ALPACA, "history") if form == "alpaca" else ("messages",))}
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    # ms_hub_url is the data set's name at ModelScope, which is not read here.
    given = {key for key, value in entry.items() if value is not None and not key.startswith("ms_")}
    wrong = sorted(given - _ENTRY)
    wrong += [f"columns.{key}" for key in columns if key not in known]
    wrong += [f"tags.{key}" for key in tags if key not in _TAGS]
    if wrong:
        raise ValueError(f"{where}: not supported: {', '.join(wrong)}")
    if "hf_hub_url" in entry:
        data = entry["hf_hub_url"] + (f"@{entry['revision']}" if entry.get("revision") else "")
        data += f":{entry['split']}" if entry.get("split") else ""
    elif isinstance(entry.get("file_name"), str):
        data = str(file.parent / entry["file_name"])
        if INFO in Path(data).name:
            raise ValueError(f"{where}: file_name must be a file of rows, got {entry['file_name']!r}")
    else:
        raise ValueError(f"{where}: must have file_name or hf_hub_url")
    named = columns or (_ALPACA if form == "alpaca" else {})
    return Entry(data, form == "alpaca", {"messages": "conversations", **named}, {**_TAGS, **tags})


def alpaca_messages(row: Mapping[str, Any], columns: Mapping[str, str] = _ALPACA) -> Any:
    """The turns of a row in the alpaca form.

    The question is the prompt and then, on a new line, the query. `history` holds earlier pairs of turns.

    >>> row = {"instruction": "<video>What moves?", "input": "", "output": "A ring."}
    >>> [turn["content"] for turn in alpaca_messages(row)]
    ['<video>What moves?', 'A ring.']
    """
    prompt, query, answer = (row.get(columns.get(name, "")) for name in ("prompt", "query", "response"))
    if query and isinstance(query, str) and isinstance(prompt, str):
        prompt = f"{prompt}\n{query}"
    messages: list[Any] = []
    before = row.get(columns.get("history", "")) or []
    for pair in [*(before if isinstance(before, list) else [before]), (prompt, answer)]:
        if isinstance(pair, list | tuple) and len(pair) == 2:
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            messages.append(pair)  # which no reader takes for a turn
    return messages
