"""The rows of json and jsonl files as a stream, each with the place it can be read from again."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

__all__ = ["Row", "stream_rows"]

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_PIECE = 1 << 20
"""Bytes of an array that are read at a time."""


class Row(NamedTuple):
    """One decoded value of a data file.

    line: 1-based line where it starts; offset: its first byte in the file; problem: why there is no value,
    empty when there is one.
    """

    line: int
    offset: int
    value: Any
    problem: str = ""


def stream_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of json lines, or of one json array; neither is ever held in memory whole.

    A line that cannot be decoded is a row with a problem. In an array everything after a broken element is
    lost, and said to be.
    """
    with path.open("rb") as file:
        array = _is_array(file)
        file.seek(0)
        yield from _array(file) if array else _lines(file)


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


def _lines(file: BinaryIO) -> Iterator[Row]:
    start = 0
    for number, whole in enumerate(file, start=1):
        line = whole.removeprefix(_BOM).strip()
        if line:
            yield Row(number, start + whole.index(line[:1]), *_decode(line))
        start += len(whole)


def _is_array(file: BinaryIO) -> bool:
    """Tell one top-level array from lines, the first of which may be an array by mistake."""
    first = b""
    while not first.endswith(b"\n") or not first.removeprefix(_BOM).strip():
        line = file.readline(_PIECE)
        if not line:
            break
        first = line
        if len(line) == _PIECE and not line.endswith(b"\n"):
            break
    first = first.removeprefix(_BOM).strip()
    if not first.startswith(b"["):
        return False
    return not _more(file) or bool(_decode(first)[1])


def _more(file: BinaryIO) -> bool:
    return any(piece.strip() for piece in iter(lambda: file.read(_PIECE), b""))


class _Text:
    """A window on a file's text that grows while a value in it is incomplete and forgets what was read."""

    def __init__(self, file: BinaryIO, offset: int = 0, piece: int = _PIECE) -> None:
        self.file, self.piece = file, piece
        self.text, self.at = "", 0
        self.offset, self.line = offset, 1
        self.done = False
        self.broken = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.fed = offset

    def grow(self) -> bool:
        """Take in more of the file, as much again as there is; False at its end."""
        if self.done:
            return False
        size = max(self.piece, len(self.text) - self.at)
        piece = self.file.read(size)
        self.done = len(piece) < size
        pending = len(self.decoder.getstate()[0])
        try:
            more = self.decoder.decode(piece, final=self.done)
        except UnicodeDecodeError as error:
            # What stands before the bad byte is still good.
            self.done, self.broken = True, f"not utf-8 at byte {self.fed - pending + error.start}"
            more = error.object[: error.start].decode("utf-8")
        self.fed += len(piece)
        self.text, self.at = self.text[self.at :] + more, 0
        return True

    def move(self, to: int) -> None:
        """Pass over the text up to a position."""
        passed = self.text[self.at : to]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.line += passed.count("\n")
        self.at = to

    def next(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in _SPACE:
                to += 1
            self.move(to)
            if to < len(self.text):
                return self.text[to]
            if not self.grow():
                return ""

    def value(self) -> tuple[Any, int]:
        """The json value that starts here, and where it ends.

        Raises:
            json.JSONDecodeError, RecursionError, ValueError: there is none.
        """
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos + 16 > len(self.text) or error.msg.startswith("Unterminated string")
                if not cut or not self.grow():
                    raise
                continue
            # A number at the window's edge may go on behind it.
            if end < len(self.text) or not self.grow():
                return value, end


def _array(file: BinaryIO) -> Iterator[Row]:
    """Yield the elements of a top-level array up to a broken one."""
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    text = _Text(file, file.tell())
    text.next()
    text.move(text.at + 1)
    while text.next() not in ("]", ""):
        try:
            value, end = text.value()
        except json.JSONDecodeError as error:
            if text.broken:
                break
            line = text.line + error.doc.count("\n", text.at, error.pos)
            byte = text.offset + len(error.doc[text.at : error.pos].encode("utf-8"))
            yield Row(line, text.offset, None, f"{error.msg} at byte {byte}; the rest of the array is lost")
            return
        except (RecursionError, ValueError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            yield Row(text.line, text.offset, None, f"{why}; the rest of the array is lost")
            return
        yield Row(text.line, text.offset, value)
        text.move(end)
        if text.next() == ",":
            text.move(text.at + 1)
        elif text.next() not in ("]", ""):
            problem = "no comma between elements; the rest of the array is lost"
            yield Row(text.line, text.offset, None, problem)
            return
    if text.broken:
        yield Row(text.line, text.offset, None, f"{text.broken}; the rest of the array is lost")
    elif not text.next():
        yield Row(text.line, text.offset, None, "the array is not closed")
    else:
        line, offset = text.line, text.offset
        text.move(text.at + 1)
        if text.next():
            yield Row(line, offset, None, "text after the end of the array")
