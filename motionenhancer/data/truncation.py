"""Detect truncated files from their own bytes."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

_HEAD = 64 * 1024
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def missing_share(path: Path, stream: Any) -> float | None:
    """Return the share of a clip that is missing at the end of its file.

    A frame count in a header proves nothing: with edit lists and empty chunks, fewer frames are shown.

    Args:
        path: the file.
        stream: PyAV's video stream, after all packets were read.

    Returns:
        0 for a file that is proven complete, 1 for a file that is cut at an unknown place, a share between
        these if the file states its size, and None if the format gives no evidence.
    """
    name = stream.container.format.name
    size = os.path.getsize(path)
    if name.startswith("mov"):
        entries = stream.index_entries
        beyond = sum(entry.pos + entry.size > size for entry in entries)
        if not stream.frames:  # A fragmented file states no number: nobody knows which fragments followed.
            return 1.0 if beyond else None
        return beyond / max(1, len(entries))
    with open(path, "rb") as file:
        declared = _DECLARED[name](file.read(_HEAD)) if name in _DECLARED else None
        if declared is not None:
            return max(0.0, 1 - size / declared)
        if name in _ENDS:
            whole = _ENDS[name](file, size)
            return None if whole else 1.0
    return None


def _riff_size(head: bytes) -> int | None:
    size = int.from_bytes(head[4:8], "little")
    # Recorders write a size of 0 or -1 and correct it when they finish.
    return size + 8 if head[:4] == b"RIFF" and 0 < size < 0xFFFFFFFF else None


def _matroska_size(head: bytes) -> int | None:
    at = head.find(b"\x18\x53\x80\x67") + 4  # The segment's id, then its size as a number of variable length.
    if at < 4 or at >= len(head) or not head[at]:
        return None
    length = 9 - head[at].bit_length()
    size = int.from_bytes(head[at : at + length], "big") - (1 << 7 * length)
    unknown = (1 << 7 * length) - 1  # All bits set: written while recording.
    return None if size == unknown else at + length + size


def _asf_size(head: bytes) -> int | None:
    at = head.find(_ASF_FILE_PROPERTIES)
    size = int.from_bytes(head[at + 40 : at + 48], "little") if at >= 0 else 0
    return size or None


def _flv_size(head: bytes) -> int | None:
    name = b"\x00\x08filesize\x00"  # A property: length of its name, name, type "number".
    at = head.find(name)
    value = head[at + len(name) : at + len(name) + 8]
    size = struct.unpack(">d", value)[0] if at >= 0 and len(value) == 8 else 0.0
    return int(size) if 0 < size < 2**63 else None


_DECLARED = {"avi": _riff_size, "matroska,webm": _matroska_size, "asf": _asf_size, "flv": _flv_size}
"""libav's format name → function that reads the file's size in bytes from its header, or None."""


def _ends_with_tag(file: BinaryIO, size: int) -> bool:
    """Whether an FLV file ends with its last tag and the size of that tag."""
    file.seek(size - 4)
    length = int.from_bytes(file.read(4), "big")
    if not 11 <= length <= size - 4:
        return False
    file.seek(size - 4 - length)
    tag = file.read(4)
    return tag[0] & 0x1F in (8, 9, 18) and int.from_bytes(tag[1:4], "big") + 11 == length


def _ends_with_packet(file: BinaryIO, size: int) -> bool:
    """Whether a transport stream ends at the end of a packet; True if the packet length is unknown."""
    file.seek(0)
    head = file.read(_HEAD)
    for length, first in ((188, 0), (192, 4), (204, 0)):
        starts = head[first : first + 8 * length : length]
        if starts and set(starts) == {0x47}:
            return size % length == 0
    return True


def _ends_with_last_page(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg file is marked as the last one of its stream."""
    file.seek(max(0, size - _HEAD - 255))
    tail = file.read()
    at = tail.rfind(b"OggS")
    return at < 0 or (len(tail) > at + 5 and bool(tail[at + 5] & 4))


_ENDS = {"flv": _ends_with_tag, "mpegts": _ends_with_packet, "ogg": _ends_with_last_page}
"""libav's format name → function of file and size: whether the file ends as the format requires."""
