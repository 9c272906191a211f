"""Sources of rows: a file, a data set of the Hub, a `datasets.Dataset`, LLaMA-Factory's list of data sets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .llama_factory import INFO, read_entry
from .rows import Row, stream_rows
from .video import content_digest

_FILES = (".json", ".jsonl", ".parquet")
_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]*\w)(@(?P<revision>[\w./-]+))?(:(?P<split>\w+))?", re.ASCII
)


@dataclass(frozen=True)
class Source:
    """Rows of a data set.

    Attributes:
        name: the given name.
        rows: streams the rows from the start.
        root: default folder of relative paths of clips.
        file: the file; None if the rows do not come from a single file.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    root: Path
    file: Path | None = None

    def digest(self) -> str:
        """A sha256 of the file, or of all rows."""
        if self.file is not None:
            return content_digest(self.file)
        found = hashlib.sha256()
        for row in self.rows():
            found.update(json.dumps(row.value, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        return found.hexdigest()


def check_source(data: Any, flag: str, *, folder: bool = False) -> None:
    """Refuse invalid data, and data that needs a package that is not installed. Nothing is read.

    Args:
        data: see `open_source`.
        flag: name for errors, for instance ``"--data"``.
        folder: whether a folder of json files is allowed.

    Raises:
        ValueError: names the flag and what would be right.
    """
    if _is_dataset(data):
        if not hasattr(data, "column_names") or not hasattr(data, "__len__") or hasattr(data, "keys"):
            raise ValueError(f"{flag} must be one datasets.Dataset, got {type(data).__name__}")
        return
    name, path = str(data), _file(data)
    if folder and path.is_dir():
        if not any(path.glob("*.json")):
            raise ValueError(f"{flag} must be a file or a folder with json files, {name} holds none")
        return
    needed = "pyarrow" if path.suffix == ".parquet" else None
    if not path.is_file():
        if not _is_id(name):
            kind = "file or folder" if folder else "file"
            raise ValueError(f"{flag} must be a {kind} that exists, got {name}")
        needed = "datasets"
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise ValueError(f"{flag} {name} needs {needed}: pip install {needed}")


def open_source(data: Any, *, folder: bool = False) -> Source:
    """The rows of a data set.

    Args:
        data: a json, jsonl or parquet file; `dataset_info.json:NAME`, an entry of LLaMA-Factory's list; a
            data set of the Hub, `owner/name`, `owner/name@revision` or `owner/name:split`; or a
            `datasets.Dataset`.
        folder: whether a folder is allowed. Its rows are the rows of its json files, ordered by name.

    Raises:
        ValueError: the data cannot be read, or it needs a package that is not installed.
    """
    if _is_dataset(data):
        check_source(data, "data")
        return Source(f"datasets.Dataset of {len(data)} rows", lambda: _dataset_rows(data), Path())
    name, path = str(data), _file(data)
    if folder and path.is_dir():
        files = sorted(path.glob("*.json"))
        return Source(name, lambda: (row for file in files for row in stream_rows(file)), path.parent)
    if path.name == INFO:
        entry = read_entry(path, name.rpartition(INFO)[2].removeprefix(":"))
        inner = open_source(entry.data)
        return Source(name, lambda: map(entry.row, inner.rows()), path.parent)
    if not _is_id(name):
        stream = _parquet_rows if path.suffix == ".parquet" else stream_rows
        stream(path)  # which raises where there is no such file
        return Source(name, lambda: stream(path), path.parent, path)
    dataset = _of_hub(name)
    return Source(name, lambda: _dataset_rows(dataset), Path())


def _is_dataset(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def _file(data: str | Path) -> Path:
    path = Path(data)
    return path.parent / INFO if path.name.startswith(f"{INFO}:") else path


def _is_id(name: str) -> bool:
    path = _file(name)
    return not path.exists() and path.suffix not in _FILES and _ID.fullmatch(name) is not None


def _parquet_rows(path: Path) -> Iterator[Row]:
    check_source(path, "path")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error

    return _table_rows(value for batch in file.iter_batches(batch_size=1000) for value in batch.to_pylist())


def _dataset_rows(dataset: Any) -> Iterator[Row]:
    for name, feature in dataset.features.items():
        if type(feature).__name__ in ("Video", "Image", "Audio"):
            # Clips are read by the reader of clips, and only when it is their turn.
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return _table_rows(dataset)


def _table_rows(values: Iterable[Any]) -> Iterator[Row]:
    return (Row(line, 0, _given(value)) for line, value in enumerate(values, start=1))


def _given(value: Any) -> Any:
    """A value without its null entries: in a table, a key that only one row has is null in all others."""
    if isinstance(value, dict):
        return {key: _given(one) for key, one in value.items() if one is not None}
    return [_given(one) for one in value] if isinstance(value, list) else value


def _of_hub(name: str) -> Any:
    check_source(name, "path")
    from datasets import load_dataset

    found = _ID.fullmatch(name)
    assert found is not None
    try:
        return load_dataset(found["id"], revision=found["revision"], split=found["split"] or "train")
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: no such file, and no data set that the Hub gives ({said})") from error
