"""Requests of priors for samples, and their results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from ..data import Clip, Sample, SkipLog, prompt_text
from ..data.clip import named_by, segment_of
from ..data.video import VideoError
from .prior import MotionPrior
from .prior_settings import PriorSettings

NO_INPUT = "no prior: no text or no video file"

#: Number of clips whose digests are remembered: a data file mostly has a clip's samples near each other.
_REMEMBERED = 4096


@dataclass(frozen=True)
class PriorRequest:
    """A request of a prior.

    Attributes:
        video: the clip, or its segment.
        text: the text for the teacher.
        key: key of the prior in a store; empty for a prior that is not stored.
        settings: settings of this prior, if they differ from the maker's; such a prior is not stored.
        said: other data of the sample that the prior depends on, as json; empty for a teacher that reads only
            clip and text.
        parts: one request for each of several teachers, whose priors are combined; None for a teacher that is
            not asked.
    """

    video: Path | Clip
    text: str
    key: str = ""
    settings: PriorSettings | None = None
    said: str = ""
    parts: tuple[PriorRequest | None, ...] = ()


@dataclass(frozen=True)
class Made:
    """The result of a request.

    Attributes:
        prior: the prior.
        fresh: whether it was made now, not found in the store.
        seconds: wall time that the teacher spent on it.
        damaged: fault of a stored file that was set aside; empty if there was none.
        lost: why the store could not keep the prior; empty if it is kept.
        left_out: (reason, detail) of each part that was left out of the prior.
        roundtrip: inversion error of the clip, if it was measured; see `inversion_errors`.
    """

    prior: MotionPrior
    fresh: bool = True
    seconds: float = 0.0
    damaged: str = ""
    lost: str = ""
    left_out: tuple[tuple[str, str], ...] = ()
    roundtrip: dict[str, float] | None = None

    def describe(self, sample: Sample, request: PriorRequest) -> dict[str, Any]:
        """The entry of a sample's prior in the run's report, ready for JSON."""
        about = {"id": sample.id, "video": str(request.video), "key": request.key or None}
        return {**about, "made_now": self.fresh, **self.prior.describe()}


def request_key(name: Callable[[str, str], str], digest: str, request: PriorRequest) -> str:
    """The key of a prior in a store.

    Args:
        name: `prior_keys` of the teacher and its settings.
        digest: `content_digest` of the clip's file.
        request: request of the prior.
    """
    return name(clip_name(digest, request), request.text)


def clip_name(digest: str, request: PriorRequest) -> str:
    """The part of a prior's key that names the input: the clip's file, its segment, and `said`."""
    shown = named_by(digest, request.video)
    return f"{shown} {sha256(request.said.encode()).hexdigest()}" if request.said else shown


def request_priors(
    samples: Iterable[Sample],
    source: str,
    skips: SkipLog,
    *,
    name: Callable[[str, str], str] | None = None,
    digest: Callable[[Path], str] | None = None,
    said: Callable[[Sample, str], str] | None = None,
    workers: int = 2,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Sample, PriorRequest]]:
    """Yield each sample with the request of its prior, as a stream.

    Samples without exactly one video, without text or without a readable clip are counted in `skips`.

    Args:
        samples: from `read_samples`.
        source: "both", "question" or "answer": the text for the teacher.
        skips: counts samples without a prior, with the reason.
        name: `prior_keys` of the teacher and its settings. None: keys are empty and no clip is read.
        digest: reads a clip's `content_digest`; needed with `name`.
        said: (sample, source) → `PriorRequest.said`; ValueError if there can be no prior. By default "".
        workers: number of threads that read clips a few samples ahead.
        part, parts: yield only the samples of this part. A hash of a clip's path gives its part, so each
            sample is in exactly one part. Each part counts only its own skips.
    """
    read = digest if name is not None else _look
    assert read is not None
    pool = ThreadPoolExecutor(workers)
    ask = lru_cache(_REMEMBERED)(lambda video: pool.submit(_try, read, video))
    waiting: deque[tuple[Sample, PriorRequest, Future[str | VideoError]]] = deque()

    def settle() -> Iterator[tuple[Sample, PriorRequest]]:
        sample, request, answer = waiting.popleft()
        found = answer.result()
        if isinstance(found, VideoError):
            skips.add(NO_INPUT, id=sample.id, line=sample.line, detail=str(found))
        else:
            yield sample, request if name is None else replace(request, key=request_key(name, found, request))

    try:
        for sample in samples:
            if parts > 1 and _owner(sample, parts) != part:
                continue
            if len(sample.videos) != 1:
                reason = "no prior: alignment needs one video"
                skips.add(reason, id=sample.id, line=sample.line, detail=f"has {len(sample.videos)} videos")
                continue
            try:
                text, _ = prompt_text(sample, source)  # type: ignore[arg-type]
            except ValueError as error:
                skips.add(NO_INPUT, id=sample.id, line=sample.line, detail=str(error))
                continue
            try:
                more = "" if said is None else said(sample, source)
            except ValueError as error:
                skips.add(f"no prior: {error}", id=sample.id, line=sample.line)
                continue
            request = PriorRequest(segment_of(sample.videos[0]), text, said=more)
            waiting.append((sample, request, ask(Path(sample.videos[0]))))
            if len(waiting) > 8 * workers:
                yield from settle()
        while waiting:
            yield from settle()
    finally:
        pool.shutdown(cancel_futures=True)


def _try(read: Callable[[Path], str], video: Path) -> str | VideoError:
    try:
        return read(video)
    except VideoError as error:
        # A stored error that was raised would keep the frames of its traceback in memory.
        return error.with_traceback(None)


def _look(video: Path) -> str:
    try:
        if not video.is_file():
            raise VideoError(video, "no such file")
    except OSError as error:
        raise VideoError(video, f"cannot be read ({error.strerror})", passing=True) from None
    return ""


def _owner(sample: Sample, parts: int) -> int:
    """Return the part of a sample; the first part has the samples without a video."""
    if not sample.videos:
        return 0
    # Not a checksum: names that differ in a digit alone often have the same last bit.
    path = os.fspath(sample.videos[0]).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(path, digest_size=8).digest()) % parts
