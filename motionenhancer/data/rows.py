"""Stream the rows of json and jsonl files, each with its position in the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_TOO_DEEP = "nested too deeply"
_PIECE = 1 << 20
"""Number of bytes of an array that are read at a time."""


class Row(NamedTuple):
    """One decoded value of a data file.

    line: 1-based line where it starts. offset: its first byte in the file. problem: why there is no value;
    empty if there is one.
    """

    line: int
    offset: int
    value: Any
    problem: str = ""


def stream_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a jsonl file or of one json array. Neither is held in memory as a whole.

    A line that cannot be decoded is a row with a problem. In an array, everything after a broken element is
    lost, and the problem of that row says so.

    Raises:
        ValueError: at the call, the file does not exist.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"path must be a json or jsonl file, {path} {what}")

    def rows() -> Iterator[Row]:
        with path.open("rb") as file:
            array = _is_array(file)
            file.seek(0)
            yield from _array(file) if array else _lines(file)

    return rows()


def _decode(line: bytes) -> tuple[Any, str]:
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not utf-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return None, f"{error.msg} at column {error.colno}"
    except RecursionError:
        return None, _TOO_DEEP
    except ValueError as error:
        return None, str(error)


def _lines(file: BinaryIO) -> Iterator[Row]:
    start = 0
    for number, whole in enumerate(file, start=1):
        line = whole.removeprefix(_BOM).strip()
        if line:
            yield Row(number, start + whole.index(line[:1]), *_decode(line))
        start += len(whole)


def _is_array(file: BinaryIO) -> bool:
    """Whether a file is one top-level array, not lines whose first line may be an array by mistake."""
    first = b""
    for line in iter(lambda: file.readline(_PIECE), b""):
        first = line.removeprefix(_BOM).strip()
        if first or not line.endswith(b"\n"):
            break
    if not first.startswith(b"["):
        return False
    more = any(piece.strip() for piece in iter(lambda: file.read(_PIECE), b""))
    return not more or _decode(first)[1] not in ("", _TOO_DEEP)


class _Text:
    """A window on a file's text. It grows while a value is incomplete and drops text that was read.

    A byte that is not utf-8 becomes half a surrogate pair, which utf-8 text cannot contain.
    """

    def __init__(self, file: BinaryIO, piece: int = _PIECE) -> None:
        self.file, self.piece = file, piece
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = "", 0
        self.offset, self.line = file.tell(), 1
        self.done = False

    def grow(self) -> bool:
        """Read more of the file, doubling the window; False at the end of the file."""
        if self.done:
            return False
        size = max(self.piece, len(self.text) - self.at)
        piece = self.file.read(size)
        self.done = len(piece) < size
        self.text, self.at = self.text[self.at :] + self.decoder.decode(piece, final=self.done), 0
        return True

    def move(self, to: int) -> None:
        """Skip the text up to a position."""
        passed = self.text[self.at : to]
        self.offset += _size(passed)
        self.line += passed.count("\n")
        self.at = to

    def next(self) -> str:
        """Return the next non-space character without skipping it; empty at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in _SPACE:
                to += 1
            self.move(to)
            if to < len(self.text):
                return self.text[to]
            if not self.grow():
                return ""

    def value(self) -> Any:
        """Skip the json value that starts here, and return it.

        Raises:
            json.JSONDecodeError, RecursionError, ValueError: there is no valid json value.
        """
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos + 16 > len(self.text) or error.msg.startswith("Unterminated string")
                if not cut or not self.grow():
                    raise
                continue
            # A number at the window's edge may continue beyond it.
            if end < len(self.text) or not self.grow():
                break
        try:
            self.text[self.at : end].encode("utf-8")
        except UnicodeEncodeError as error:
            place = self.offset + _size(self.text[self.at : self.at + error.start])
            raise ValueError(f"not utf-8 at byte {place}") from None
        self.move(end)
        return value


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _array(file: BinaryIO) -> Iterator[Row]:
    """Yield the elements of a top-level array up to a broken one."""
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    text = _Text(file)
    text.next()
    text.move(text.at + 1)
    problem = ""
    while not problem and text.next() not in ("]", ""):
        line, offset = text.line, text.offset
        try:
            value = text.value()
        except json.JSONDecodeError as error:
            line += error.doc.count("\n", text.at, error.pos)
            problem = f"{error.msg} at byte {offset + _size(error.doc[text.at : error.pos])}"
        except RecursionError:
            problem = _TOO_DEEP
        except ValueError as error:
            problem = str(error)
        else:
            yield Row(line, offset, value)
            if text.next() == ",":
                text.move(text.at + 1)
            elif text.next() not in ("]", ""):
                line, offset, problem = text.line, text.offset, "no comma between elements"
    if problem:
        yield Row(line, offset, None, f"{problem}; the rest of the array is lost")
    elif not text.next():
        yield Row(text.line, text.offset, None, "the array is not closed")
    else:
        line, offset = text.line, text.offset
        text.move(text.at + 1)
        if text.next():
            yield Row(line, offset, None, "text after the end of the array")
