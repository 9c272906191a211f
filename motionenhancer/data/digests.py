"""Digests of files, kept between runs, so that unchanged files are not read again for their keys."""

from __future__ import annotations

import os
import secrets
import time
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from .video import VideoError, content_digest

FOLDER = ".digests"
#: Bytes of a model's file whose digest is worth keeping.
LARGE = 4 << 20
#: A digest: a hash of its file's path, size and times; the sha256 of the file's bytes; a check of both.
RECORD = np.dtype([("file", "<u8", 2), ("digest", "u1", 32), ("check", "<u8")])
#: Minimum age of a file in ns: the file system's clock cannot tell two writes within one tick.
REST = 2_000_000_000


def file_digest(path: Path) -> str:
    """The sha256 of all bytes of a model's file, in hex.

    The digest of a large file is kept in the user's cache folder until the file changes.

    Raises:
        OSError: the file cannot be read.
    """
    seen = _look(path)
    try:
        if seen is None or path.stat().st_size < LARGE or time.time_ns() - seen[1] <= REST:
            return content_digest(path)
        return _remembered(path, seen)
    except VideoError as error:
        raise OSError(str(error)) from error


@lru_cache(maxsize=4096)
def _remembered(path: Path, seen: tuple[bytes, int]) -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with DigestCache(Path(home) / "motionenhancer") as cache:
        return cache.digest(path)


class DigestCache:
    """Results of `content_digest` from earlier runs, kept in `.digests`; about 64 bytes of memory a file.

    A digest is valid for one path, size, modification time and change time; otherwise the file is read again.
    Each process that reads new files writes their digests to its own file, one whole record at a time. A
    record that is cut or altered is ignored. A folder that cannot be written is not an error.

    Example:
        >>> import tempfile
        >>> clip = Path(tempfile.mkdtemp()) / "clip.mp4"
        >>> _ = clip.write_bytes(b"a clip")
        >>> with DigestCache(clip.parent) as cache:
        ...     cache.digest(clip) == content_digest(clip)
        True
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = folder / FOLDER, writes
        parts = [np.zeros(0, RECORD)]
        for path in self.folder.glob("*.bin"):
            body = path.read_bytes()
            parts.append(np.frombuffer(body, RECORD, len(body) // RECORD.itemsize))
        records = np.concatenate(parts)
        self._records = records[np.argsort(records["file"][:, 0], kind="stable")]
        self._starts = np.ascontiguousarray(self._records["file"][:, 0])
        self._out: BinaryIO | None = None
        self._lock = Lock()

    def __enter__(self) -> DigestCache:
        return self

    def __exit__(self, *error: object) -> None:
        if self._out is not None:
            self._out.close()

    def digest(self, video: Path) -> str:
        """The `content_digest` of a file.

        Raises:
            VideoError: the file does not exist or cannot be read.
        """
        seen = _look(video)
        known = None if seen is None else self._find(seen[0])
        if known is not None:
            return known
        digest = content_digest(video)
        if self.writes and seen is not None and time.time_ns() - seen[1] > REST and _look(video) == seen:
            self._keep(seen[0] + bytes.fromhex(digest))
        return digest

    def _find(self, name: bytes) -> str | None:
        start = np.frombuffer(name, "<u8", 1)[0]
        at = int(np.searchsorted(self._starts, start))
        while at < len(self._starts) and self._starts[at] == start:
            record = self._records[at].tobytes()
            if record.startswith(name) and record[48:] == _check(record[:48]):
                return record[16:48].hex()
            at += 1
        return None

    def _keep(self, record: bytes) -> None:
        with self._lock:
            try:
                if self._out is None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    name = f"{os.getpid()}-{secrets.token_hex(8)}.bin"
                    self._out = (self.folder / name).open("xb", buffering=0)
                self._out.write(record + _check(record))
            except OSError:
                self.writes = False


def _look(video: Path) -> tuple[bytes, int] | None:
    """Return an id of a file's current state and its last change time; None if it cannot be read."""
    try:
        found = os.stat(video)
    except OSError:
        return None
    # ctime too: tools that copy and unpack files set mtime back.
    about = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} ".encode()
    name = blake2b(about + os.fsencode(os.path.abspath(video)), digest_size=16).digest()
    return name, max(found.st_mtime_ns, found.st_ctime_ns)


def _check(record: bytes) -> bytes:
    return blake2b(record, digest_size=8).digest()
