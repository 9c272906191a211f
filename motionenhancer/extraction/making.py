"""Making the priors that are missing from a store, with clips decoded ahead of the teacher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ..data import SkipLog
from ..data.clip import named_by
from ..data.video import VideoError, content_digest, read_frames
from ..prior import MotionPrior, PriorError, PriorSettings, extract_prior
from ..store import DamagedPrior, PriorStore, Refusal, prior_keys
from ..vdm import Teacher, roundtrip_error
from .planning import PriorRequest

#: Note of a prior some of whose text is none of its words; see `MotionPrior.unknown`.
PARTLY_UNKNOWN = "priors of texts with characters that the teacher's tokenizer has no piece for"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class MadePriors:
    """What `make_priors` did.

    Attributes:
        keys: sample id → key of its prior in the store.
        described: one entry a sample with a prior, JSON-ready (see `MotionPrior.describe`).
        unusable: ids of samples whose video cannot be read at all.
        roundtrip: inversion error of the first clip, if it was asked for.
        stored: priors that were in the store.
        made: priors made now.
    """

    keys: dict[str, str] = field(default_factory=dict)
    described: list[dict[str, Any]] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    roundtrip: dict[str, float] | None = None
    stored: int = 0
    made: int = 0


def make_priors(
    requests: Sequence[PriorRequest],
    store: PriorStore,
    settings: PriorSettings,
    load: Callable[[], Teacher],
    skips: SkipLog,
    *,
    measure_roundtrip: bool = False,
    decode_workers: int = 2,
    describe: bool = True,
    progress: bool | None = None,
) -> MadePriors:
    """Make and store every requested prior that the store does not hold; what it holds is checked.

    What the store has on record as without a prior is not tried again, and counted like any other such clip.

    Args:
        requests: from `plan_priors`; under several processes, this process's share.
        store: read first, written as priors come.
        settings: of the extraction.
        load: returns the teacher; called at most once, and only when something is missing.
        skips: receives damaged files that were re-made, and samples that got no prior.
        measure_roundtrip: invert and rebuild the first clip made here without guidance, and report the error.
        decode_workers: threads that check stored priors, and then decode the next so many clips while the
            teacher reads one.
        describe: fill in `MadePriors.described`, which grows with the samples.
        progress: show bars; default only in the main process.

    Raises:
        ValueError: decode_workers below 1.
    """
    if decode_workers < 1:
        raise ValueError(f"decode_workers must be at least 1, got {decode_workers}")
    if progress is None:
        progress = PartialState().is_main_process
    by_key: dict[str, list[PriorRequest]] = {}
    for request in requests:
        by_key.setdefault(request.key, []).append(request)
    made = MadePriors()
    described: dict[str, dict[str, Any]] = {}

    def keep(key: str, prior: MotionPrior, fresh: bool) -> None:
        made.keys.update({request.sample.id: key for request in by_key[key]})
        if prior.unknown:
            skips.note(PARTLY_UNKNOWN)
        if describe:
            described[key] = {"key": key, "made_now": fresh, **prior.describe()}

    missing: list[PriorRequest] = []
    with ThreadPoolExecutor(decode_workers) as pool:
        firsts = [group[0] for group in by_key.values()]
        with tqdm(firsts, desc="stored", unit="prior", disable=not progress, leave=False) as bar:
            for request, reading in ahead(pool, lambda r: stored(store, r.key), bar, decode_workers):
                found = reading.result()
                if isinstance(found, MotionPrior):
                    made.stored += 1
                    keep(request.key, found, False)
                    continue
                if found is None and (refusal := store.refusal(request.key)) is not None:
                    _refuse(by_key[request.key], on_record(refusal, store, request.key), skips, made)
                    continue
                missing.append(request)
                if isinstance(found, DamagedPrior):
                    tqdm.write(
                        f"damaged prior of sample {request.sample.id} set aside, making it anew: {found}"
                    )
                    skips.note("damaged priors made anew")
    if missing:
        teacher = load()
        making = tqdm(
            desc="priors", unit="prior", total=len(by_key), initial=made.stored, disable=not progress
        )
        with making:
            for one in make_each(missing, store, settings, teacher, decode_workers=decode_workers):
                if isinstance(one.result, MotionPrior):
                    made.made += 1
                    keep(one.request.key, one.result, True)
                    if measure_roundtrip and made.roundtrip is None:
                        made.roundtrip = one.roundtrip(teacher, settings.steps)
                else:
                    _refuse(by_key[one.request.key], refusal_of(one.result), skips, made)
                making.update()
    if describe:
        made.described = [
            {"id": r.sample.id, "video": str(r.video), **described[r.key]}
            for r in requests
            if r.key in described
        ]
    return made


@dataclass(frozen=True)
class Attempt:
    """What came of one request: its prior, which is in the store, or why there is none.

    Attributes:
        request: what was asked for.
        result: the prior, or the error.
        frames: (n, h, w, 3) uint8, the clip as the teacher was given it; None where it could not be read.
    """

    request: PriorRequest
    result: MotionPrior | VideoError | PriorError
    frames: np.ndarray | None = None

    def roundtrip(self, teacher: Teacher, steps: int) -> dict[str, float]:
        """See `inversion_errors`."""
        assert self.frames is not None
        return inversion_errors(teacher, self.frames, self.request.text, steps)


def inversion_errors(teacher: Teacher, frames: np.ndarray, text: str, steps: int) -> dict[str, float]:
    """Relative errors of invert-then-rebuild of a clip: over the whole schedule, and over its lower 60 %."""
    latents, embeds = teacher.encode_video(frames).latents, teacher.encode_text(text).embeds
    whole = teacher.schedule(steps)
    errors = {"whole_schedule": roundtrip_error(teacher, latents, whole, embeds)}
    cut = 0.6 * (whole.timesteps[-1] + 1)
    if whole.timesteps[0] < cut:
        errors["short_of_zero_snr"] = roundtrip_error(teacher, latents, whole.below(int(cut)), embeds)
    return errors


def make_each(
    requests: Iterable[PriorRequest],
    store: PriorStore,
    settings: PriorSettings,
    teacher: Teacher,
    *,
    decode_workers: int = 2,
) -> Iterator[Attempt]:
    """Make and store one prior after another, in the order of `requests`, clips decoded ahead.

    Where there can be none, that is put on record in the store; what is on record already is tried again.

    Args:
        requests: one a key; read only as far ahead as clips are decoded, so it may be any length.
        store: written before an attempt is given out.
        settings: of the extraction.
        teacher: which reads the clips.
        decode_workers: threads that decode, and how many clips are decoded ahead.
    """
    name = prior_keys(teacher.id, settings)
    with ThreadPoolExecutor(decode_workers) as pool:
        for request, decoding in ahead(pool, lambda r: decode(r, teacher), requests, decode_workers):
            frames = None
            try:
                frames = decoding.result()
                prior = extract_prior(teacher, frames, request.text, **_keywords(settings))
                check_clip(request, name)
            except (VideoError, PriorError) as error:
                put_on_record(store, request, refusal_of(error), name)
                yield Attempt(request, error, frames)
            else:
                store.write(request.key, prior)
                yield Attempt(request, prior, frames)


class RefusedClip(ValueError):
    """The store has on record that this clip and text can give no prior."""


def refusal_of(error: VideoError | PriorError) -> Refusal:
    """What to put on record of a request without a prior."""
    if isinstance(error, VideoError):
        return Refusal("unreadable video", str(error), unreadable=True, passing=error.passing)
    return Refusal("no prior: the teacher cannot read it", str(error))


def on_record(refusal: Refusal, store: PriorStore, key: str) -> Refusal:
    """The same, its detail saying that it was not tried now, and where it stands."""
    return replace(
        refusal, detail=f"{refusal.detail} (on record, not tried again: {store.refusal_path(key)})"
    )


def check_clip(request: PriorRequest, name: Callable[[str, str], str]) -> None:
    """Whether a clip is still the one that its request's key was made of: hours may lie in between.

    Args:
        request: from `plan_priors`.
        name: `prior_keys` of the teacher and its settings.

    Raises:
        VideoError: it is not, or it cannot be read.
    """
    if name(named_by(content_digest(request.video), request.video), request.text) != request.key:
        raise VideoError(Path(request.video), "changed while the run was going on, start again")


def put_on_record(
    store: PriorStore, request: PriorRequest, refusal: Refusal, name: Callable[[str, str], str]
) -> None:
    """Record why a clip and text give no prior, unless the file is out of reach just now or another one."""
    # Without a record the clip is tried again, no more: a store that cannot be written stops nothing here.
    with suppress(VideoError, OSError):
        if not refusal.passing:
            check_clip(request, name)
            store.refuse(request.key, refusal)


def keep(
    store: PriorStore, request: PriorRequest, prior: MotionPrior, name: Callable[[str, str], str]
) -> str:
    """Store a prior if that can be done; returns why it was not, or nothing."""
    try:
        check_clip(request, name)
        store.write(request.key, prior)
    except VideoError:
        return "priors used, but not kept: the clip changed while the run was going on, or is out of reach"
    except OSError as error:
        return f"priors used, but not kept: the store cannot be written ({error.strerror})"
    return ""


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item with the future of `function(item)`, in order; at most `depth` more are under way."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def stored(store: PriorStore, key: str) -> MotionPrior | DamagedPrior | None:
    """A prior of a store; None where it has none; a damaged one is set aside, its error returned."""
    try:
        return store.read(key)
    except KeyError:
        return None
    except DamagedPrior as error:
        with suppress(FileNotFoundError):
            store.set_aside(key)
        return error


def stored_or_refused(store: PriorStore, key: str) -> MotionPrior | DamagedPrior | None:
    """As `stored`.

    Raises:
        RefusedClip: it is on record that there can be none.
    """
    found = stored(store, key)
    if found is None and (refusal := store.refusal(key)) is not None:
        raise RefusedClip(on_record(refusal, store, key).detail)
    return found


def decode(request: PriorRequest, teacher: Teacher) -> np.ndarray:
    """The frames of a request's clip that the teacher reads, (n, h, w, 3) uint8.

    Raises:
        VideoError: the clip cannot be read, or is a still.
    """
    return read_frames(request.video, num_frames=teacher.max_frames, min_frames=2).frames


def _refuse(requests: Sequence[PriorRequest], refusal: Refusal, skips: SkipLog, made: MadePriors) -> None:
    for request in requests:
        skips.add(refusal.reason, id=request.sample.id, line=request.sample.line, detail=refusal.detail)
        if refusal.unreadable:
            made.unusable.add(request.sample.id)


def _keywords(settings: PriorSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in PriorSettings.__dataclass_fields__}
