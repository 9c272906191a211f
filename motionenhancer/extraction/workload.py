"""The work of an extraction as a table: 53 bytes a sample, whatever its text and its clip are.

A data file of ten million lines would take tens of gigabytes as objects. Here each sample is the key of its
prior and the place in the data file that it is read from again when its turn comes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from os.path import abspath
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Clip, Sample, prompt_text
from ..data.clip import named_by, segment_of
from ..data.readers import sample_at
from ..store import PriorStore
from .planning import PriorRequest, deal

#: A sample: its prior's key; line and first byte in the data file; its clip's size in KiB, rounded up; a hash
#: of clip and text, to notice a data file that changes; whether the store held the prior.
ITEM = np.dtype(
    [
        ("key", "<u8", 4),
        ("offset", "<i8"),
        ("line", "<u4"),
        ("size", "<u4"),
        ("check", "<u4"),
        ("stored", "?"),
    ]
)
_PACKED = struct.Struct("<32sqIII?")


def key_of(item: np.void) -> str:
    """The 64 hexadecimal digits of an item's key."""
    return item["key"].tobytes().hex()


def tabulate(requests: Iterable[PriorRequest], store: PriorStore) -> np.ndarray:
    """One item a request; the requests are not kept.

    Args:
        requests: from `stream_requests`.
        store: where each distinct key is looked up, by name only.

    Returns:
        (n,) array of `ITEM`, in no particular order.
    """
    table = bytearray()
    for request in requests:
        place, size = request.sample, min(-(-max(0, request.size) // 1024), 2**32 - 1)
        check = _check(request.video, request.text)
        table += _PACKED.pack(bytes.fromhex(request.key), place.offset, place.line, size, check, False)
    items, starts = _by_key(np.frombuffer(table, ITEM))
    for start, end in pairwise(starts):
        items["stored"][start:end] = key_of(items[start]) in store
    return items


def _by_key(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items sorted by key and place, and where each key begins, with the length at the end."""
    items = items[np.lexsort((items["offset"], items["key"][:, 1], items["key"][:, 0]))]
    new = (items["key"][1:] != items["key"][:-1]).any(axis=1)
    starts = np.concatenate([np.zeros(min(1, len(items)), np.int64), np.flatnonzero(new) + 1, [len(items)]])
    return items, starts


@dataclass
class Workload:
    """All samples of an extraction that can have a prior, those of one key side by side.

    Attributes:
        items: (n,) array of `ITEM`, sorted by key and then by place.
        starts: (keys + 1,) where each key's items begin, and n.
    """

    items: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Workload:
        """Join what `tabulate` gave in each process."""
        return cls(*_by_key(np.concatenate([np.zeros(0, ITEM), *parts])))

    @property
    def firsts(self) -> np.ndarray:
        """(keys,) the first sample of each key: the one that is read to make its prior."""
        return self.items[self.starts[:-1]]

    def samples(self, index: int) -> np.ndarray:
        """Every item of the `index`-th key."""
        return self.items[self.starts[index] : self.starts[index + 1]]

    def stored(self) -> np.ndarray:
        """Indices of the keys that the store held, ascending."""
        return np.flatnonzero(self.firsts["stored"])

    def missing(self) -> np.ndarray:
        """Indices of the keys that it did not hold, in the order of the data file."""
        lacking = np.flatnonzero(~self.firsts["stored"])
        return lacking[np.argsort(self.firsts["offset"][lacking], kind="stable")]

    def lost(self, indices: Iterable[int]) -> None:
        """Count keys as missing after all: their files turned out to be damaged."""
        for index in indices:
            self.items["stored"][self.starts[index] : self.starts[index + 1]] = False

    def take(self, indices: np.ndarray) -> Share:
        """Some of the keys as a share of the work."""
        return Share(indices, self.firsts[indices])

    def deal(self, indices: np.ndarray, shares: int) -> list[Share]:
        """Some of the keys as shares of about equal work, each in the order given."""
        owner = deal(self.firsts["size"][indices], shares)
        return [self.take(indices[owner == share]) for share in range(shares)]


@dataclass
class Share:
    """Some keys of a workload.

    Attributes:
        indices: (n,) int64, which keys of the workload.
        items: (n,) array of `ITEM`, the first sample of each.
    """

    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    items: np.ndarray = field(default_factory=lambda: np.zeros(0, ITEM))

    def __len__(self) -> int:
        return len(self.indices)

    def keys(self) -> Iterator[str]:
        """The keys, in order."""
        return map(key_of, self.items)

    def __getitem__(self, part: slice) -> Share:
        return Share(self.indices[part], self.items[part])

    def split(self) -> list[Share]:
        """Shares of one key each."""
        return [self[at : at + 1] for at in range(len(self))]


def read_requests(items: Iterable[Any], data: Path, root: Path | None, source: str) -> Iterator[PriorRequest]:
    """Read the samples of some items from the data file again, one by one.

    Args:
        items: of `ITEM`.
        data: the data file.
        root: the folder of its videos; its own folder by default.
        source: "both", "question" or "answer": the text given to the teacher.

    Raises:
        ValueError: the data file has changed.
        OSError: it cannot be read.
    """
    with data.open("rb") as file:
        for item in items:
            offset, line = int(item["offset"]), int(item["line"])
            try:
                sample = sample_at(file, offset, line, data.parent if root is None else root)
                text, _ = prompt_text(sample, source)  # type: ignore[arg-type]
                same = _check(segment_of(sample.videos[0]), text) == item["check"]
            except (ValueError, IndexError):
                same = False
            if not same:
                raise ValueError(f"--data {data}: line {line} changed while the file was in use; start again")
            yield _request(sample, text, item)


def _request(sample: Sample, text: str, item: np.void) -> PriorRequest:
    video = segment_of(sample.videos[0])
    return PriorRequest(sample, video, text, key_of(item), 1024 * int(item["size"]))


def _check(video: Path | Clip, text: str) -> int:
    seen = f"{named_by(abspath(video), video)}\0{text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(seen, digest_size=4).digest())
