"""Which priors a run needs, and which process makes which."""

from __future__ import annotations

import heapq
import os
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..data import Clip, Sample, SkipLog, prompt_text
from ..data.clip import named_by, segment_of
from ..data.video import VideoError, content_digest
from ..prior import PriorSettings
from ..store import prior_keys
from .digests import DigestCache

NO_INPUT = "no prior: no text or no video file"


@dataclass(frozen=True)
class PriorRequest:
    """One prior a run needs: which sample, which clip or segment of one, which text, under which key.

    size: bytes of the clip's file; negative where it is not known.
    """

    sample: Sample
    video: Path | Clip
    text: str
    key: str
    size: int = -1


def digest_videos(videos: Iterable[Path], workers: int = 1) -> dict[Path, str | VideoError]:
    """The `content_digest` of each file, or why it has none, read in `workers` threads."""

    def digest(video: Path) -> str | VideoError:
        try:
            return content_digest(video)
        except VideoError as error:
            return error

    distinct = list(dict.fromkeys(videos))
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(distinct, pool.map(digest, distinct), strict=True))


def plan_priors(
    samples: Sequence[Sample],
    teacher: str,
    settings: PriorSettings,
    source: str,
    skips: SkipLog,
    *,
    digests: Mapping[Path, str | VideoError] | None = None,
    cache: DigestCache | None = None,
) -> list[PriorRequest]:
    """Name the prior of every sample that has exactly one video; others are counted in `skips` and get none.

    Args:
        samples: from `read_samples`.
        teacher: digest of the teacher's folder.
        settings: of the extraction.
        source: "both", "question" or "answer": the text given to the teacher.
        skips: receives samples without a prior and why.
        digests: of the clips, from `digest_videos`; clips that are not in it are read here.
        cache: knows digests of clips that earlier runs read.
    """
    return list(stream_requests(samples, teacher, settings, source, skips, digests=digests, cache=cache))


def stream_requests(
    samples: Iterable[Sample],
    teacher: str,
    settings: PriorSettings,
    source: str,
    skips: SkipLog,
    *,
    digests: Mapping[Path, str | VideoError] | None = None,
    cache: DigestCache | None = None,
    workers: int = 1,
    part: int = 0,
    parts: int = 1,
) -> Iterator[PriorRequest]:
    """What `plan_priors` lists, one by one: any number of samples, about 300 bytes kept a distinct clip.

    Each clip's file is read once, however many samples name it, a few ahead of the sample that is given out.

    Args:
        samples, teacher, settings, source, skips, digests, cache: as for `plan_priors`.
        workers: threads that read clips.
        part, parts: give out the samples of every `parts`-th clip only, and count no others. All parts
            together hold each sample once, and the samples of one clip are in one part.
    """
    read = content_digest if cache is None else cache.digest
    clips, name = _Clips(digests or {}, workers, read), prior_keys(teacher, settings)
    waiting: deque[tuple[Sample, str]] = deque()

    def settle(sample: Sample, text: str) -> Iterator[PriorRequest]:
        video = segment_of(sample.videos[0])
        found = clips.get(Path(video))
        if isinstance(found, VideoError):
            skips.add(NO_INPUT, id=sample.id, line=sample.line, detail=str(found))
            return
        digest, size = found
        yield PriorRequest(sample, video, text, name(named_by(digest, video), text), size)

    with clips:
        for sample in samples:
            if _owner(sample, parts) != part:
                continue
            if len(sample.videos) != 1:
                skips.add(
                    "no prior: alignment needs one video",
                    id=sample.id,
                    line=sample.line,
                    detail=f"has {len(sample.videos)}",
                )
                continue
            try:
                text, _ = prompt_text(sample, source)  # type: ignore[arg-type]
            except ValueError as error:
                skips.add(NO_INPUT, id=sample.id, line=sample.line, detail=str(error))
                continue
            clips.ask(Path(sample.videos[0]))
            waiting.append((sample, text))
            if len(waiting) > 8 * workers:
                yield from settle(*waiting.popleft())
        while waiting:
            yield from settle(*waiting.popleft())


def request_priors(
    samples: Sequence[Sample], settings: PriorSettings, source: str, skips: SkipLog
) -> list[PriorRequest]:
    """What `plan_priors` lists, without keys and without reading a clip: for priors that are never stored."""
    videos = {Path(video) for sample in samples for video in sample.videos}
    # A digest that no clip has.
    digests: dict[Path, str | VideoError] = {
        video: "0" * 64 if video.is_file() else VideoError(video, "no such file") for video in videos
    }
    listed = plan_priors(samples, "", settings, source, skips, digests=digests)
    return [replace(request, key="") for request in listed]


class _Clips:
    """Digest and size of every clip asked for, each file read once.

    They are kept under a hash of the path: paths are long.
    """

    def __init__(
        self, digests: Mapping[Path, str | VideoError], workers: int, read: Callable[[Path], str]
    ) -> None:
        self.digests, self.pool, self.read = digests, ThreadPoolExecutor(workers), read
        self.known: dict[bytes, bytes | VideoError | Future[bytes]] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def ask(self, video: Path) -> None:
        name = _name(video)
        if name not in self.known:
            self.known[name] = self.pool.submit(self._read, video)

    def get(self, video: Path) -> tuple[str, int] | VideoError:
        name = _name(video)
        found = self.known[name]
        if isinstance(found, Future):
            try:
                found = found.result()
            except VideoError as error:
                found = error
            self.known[name] = found
        if isinstance(found, VideoError):
            return found
        return found[8:].hex(), int.from_bytes(found[:8], "big")

    def _read(self, video: Path) -> bytes:
        digest = self.digests[video] if video in self.digests else self.read(video)
        if isinstance(digest, VideoError):
            raise digest
        return _size(video).to_bytes(8, "big") + bytes.fromhex(digest)


def _name(video: Path | Clip) -> bytes:
    return blake2b(os.fsencode(video), digest_size=16).digest()


def _owner(sample: Sample, parts: int) -> int:
    """Which of the parts has a sample; one without a single video is the first part's."""
    if parts == 1 or len(sample.videos) != 1:
        return 0
    return int.from_bytes(_name(sample.videos[0])[:8], "big") % parts


def share_requests(
    requests: Sequence[PriorRequest], shares: int, *, missing: Collection[str] | None = None
) -> list[list[PriorRequest]]:
    """Deal requests into `shares` parts of about equal work, the same way wherever it is called.

    Requests of one key stay together, so that no prior is made twice. The teacher takes about as long for
    any clip and decoding grows with the file, so a key counts half by itself and half by its file's size;
    the largest are dealt first, each to the part with the least so far.

    Args:
        requests: from `plan_priors`.
        shares: how many parts, at least 1.
        missing: keys that are to be made; the others, which are only looked up, are dealt evenly beside them.
            Processes that look into the store one after another may find different ones there: let one
            decide (see `from_main`). Default: all.

    Returns:
        `shares` lists, each in the order of `requests`; some may be empty.

    Raises:
        ValueError: fewer than one part.

    Example:
        >>> share_requests([], 2)
        [[], []]
    """
    if shares < 1:
        raise ValueError(f"shares must be at least 1, got {shares}")
    sizes: dict[str, int] = {}
    for request in requests:
        if request.key not in sizes:
            sizes[request.key] = request.size if request.size >= 0 else _size(request.video)
    keys = sorted(sizes)
    owner: dict[str, int] = {}
    for made in (True, False):
        group = [key for key in keys if (missing is None or key in missing) is made]
        owner.update(zip(group, deal([sizes[key] for key in group], shares).tolist(), strict=True))
    dealt: defaultdict[int, list[PriorRequest]] = defaultdict(list)
    for request in requests:
        dealt[owner[request.key]].append(request)
    return [dealt[share] for share in range(shares)]


def deal(sizes: Sequence[int] | np.ndarray, shares: int) -> np.ndarray:
    """The share that each of some clips belongs to, so that the shares take about equally long.

    A clip counts half by itself and half by its size. Integers only: all processes must deal alike.

    Args:
        sizes: (n,) of the clips, in one unit.
        shares: how many, at least 1.

    Returns:
        (n,) int32.

    >>> deal([9, 1, 1, 1], 2).tolist()
    [0, 1, 1, 1]
    """
    sizes = np.asarray(sizes, np.int64)
    owner = np.zeros(len(sizes), np.int32)
    if shares == 1:
        return owner
    count, total = len(sizes), int(sizes.sum())
    loads = [(0, share) for share in range(shares)]
    for index in np.argsort(-sizes, kind="stable"):
        load, share = loads[0]
        heapq.heapreplace(loads, (load + (total + count * int(sizes[index]) or 1), share))
        owner[index] = share
    return owner


def _size(video: Path | Clip) -> int:
    try:
        return os.stat(video).st_size
    except OSError:
        return 0
