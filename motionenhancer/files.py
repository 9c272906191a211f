"""Write files that appear complete, by rename, or not at all; read JSON files; print sizes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .interrupts import UNFINISHED


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` at the end, or remove it after an error.

    Args:
        path: the file to write; its folder is created.

    Raises:
        OSError: the folder or the file cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id alone: machines that share the folder may have the same.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    UNFINISHED.add(temporary)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # On a full disk the write fails, and its error names no file.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, as utf-8. Bytes of a file name that are not text become escapes."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, body: Any) -> None:
    """Write a json file whole; see `write_text`."""
    write_text(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or JSON, is nested too deeply, or holds another value; the path is named.
    """
    try:
        body = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path}: not a JSON object")
    return body


def too_deep(folder: str | Path) -> str:
    """The first JSON file of a folder, or of the folders in it, that is nested too deeply; empty if none is.

    Libraries that read such a file raise a RecursionError without its name.

    >>> too_deep("a/folder/that/is/not/there")
    ''
    """
    for path in sorted([*Path(folder).glob("*.json"), *Path(folder).glob("*/*.json")]):
        try:
            json.loads(path.read_bytes())
        except RecursionError:
            return str(path)
        except (OSError, ValueError):
            continue
    return ""


def readable(size: float) -> str:
    """Return a number of bytes as readable text.

    >>> readable(1536)
    '1.5 KB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
