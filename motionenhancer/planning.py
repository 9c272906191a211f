"""Which priors a run needs, and which process makes which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .data import Sample, SkipLog, prompt_text
from .data.video import VideoError, content_digest
from .prior import PriorSettings
from .store import prior_key


@dataclass(frozen=True)
class PriorRequest:
    """One prior a run needs: which sample, which clip, which text, under which key."""

    sample: Sample
    video: Path
    text: str
    key: str


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
) -> list[PriorRequest]:
    """Name the prior of every sample that has exactly one video; others are counted in `skips` and get none.

    Args:
        samples: from `read_samples`.
        teacher: digest of the teacher's folder.
        settings: of the extraction.
        source: "both", "question" or "answer": the text given to the teacher.
        skips: receives samples without a prior and why.
        digests: of the clips, from `digest_videos`; clips that are not in it are read here.
    """
    known = dict(digests or {})
    requests = []
    for sample in samples:
        if len(sample.videos) != 1:
            skips.add(
                "no prior: alignment needs one video",
                id=sample.id,
                line=sample.line,
                detail=f"has {len(sample.videos)}",
            )
            continue
        video = sample.videos[0]
        try:
            text, _ = prompt_text(sample, source)  # type: ignore[arg-type]
            if video not in known:
                known |= digest_videos([video])
            digest = known[video]
            if isinstance(digest, VideoError):
                raise digest
        except (ValueError, OSError) as error:
            skips.add("no prior: no text or no video file", id=sample.id, line=sample.line, detail=str(error))
            continue
        requests.append(PriorRequest(sample, video, text, prior_key(digest, text, teacher, settings)))
    return requests


def share_requests(requests: Sequence[PriorRequest], shares: int) -> list[list[PriorRequest]]:
    """Deal requests into `shares` parts of about equal work, the same way wherever it is called.

    Requests of one key stay together, so that no prior is made twice. The teacher takes about as long for
    any clip and decoding grows with the file, so a key counts half by itself and half by its file's size;
    the largest are dealt first, each to the part with the least so far.

    Args:
        requests: from `plan_priors`.
        shares: how many parts, at least 1.

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
            sizes[request.key] = _size(request.video)
    # Integers only: all processes must deal alike.
    count, total = len(sizes), sum(sizes.values())
    costs = {key: total + count * size for key, size in sizes.items()}
    loads = [0] * shares
    owner: dict[str, int] = {}
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        least = min(range(shares), key=lambda share: (loads[share], share))
        loads[least] += costs[key] or 1
        owner[key] = least
    dealt: defaultdict[int, list[PriorRequest]] = defaultdict(list)
    for request in requests:
        dealt[owner[request.key]].append(request)
    return [dealt[share] for share in range(shares)]


def _size(video: Path) -> int:
    try:
        return video.stat().st_size
    except OSError:
        return 0
