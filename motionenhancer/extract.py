"""Read a whole data file's motion priors from a teacher into a store.

`python -m motionenhancer.extract --teacher DIR --data FILE --video_root DIR --prior_dir DIR`
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from .arguments import DataArguments, PriorArguments, parse_arguments
from .data import Sample, SkipLog, prompt_text, read_samples
from .data.video import VideoError, content_digest, read_frames
from .prior import MotionPrior, PriorError, PriorSettings, extract_prior
from .processes import join_processes
from .store import DamagedPrior, PriorStore, prior_key
from .toy.world import ToyFolder, build_toy
from .vdm import Teacher, roundtrip_error

DEFAULT_TOY = "runs/toy"


@dataclass(frozen=True)
class PriorRequest:
    """One prior a run needs: which sample, which clip, which text, under which key."""

    sample: Sample
    video: Path
    text: str
    key: str


def plan_priors(
    samples: Sequence[Sample],
    teacher: str,
    settings: PriorSettings,
    source: str,
    skips: SkipLog,
) -> list[PriorRequest]:
    """Name the prior of every sample that has exactly one video; others are counted in `skips` and get none.

    Args:
        samples: from `read_samples`.
        teacher: digest of the teacher's folder.
        settings: of the extraction.
        source: "both", "question" or "answer": the text given to the teacher.
        skips: receives samples without a prior and why.
    """
    digests: dict[Path, str] = {}
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
            if video not in digests:
                digests[video] = content_digest(video)
        except (ValueError, OSError) as error:
            skips.add("no prior: no text or no video file", id=sample.id, line=sample.line, detail=str(error))
            continue
        requests.append(PriorRequest(sample, video, text, prior_key(digests[video], text, teacher, settings)))
    return requests


@dataclass
class MadePriors:
    """What `make_priors` did.

    Attributes:
        keys: sample id → key of its prior in the store.
        described: one entry a sample with a prior, JSON-ready (see `MotionPrior.describe`).
        unusable: ids of samples whose video cannot be read at all.
        roundtrip: inversion error of the first clip, if it was asked for.
    """

    keys: dict[str, str] = field(default_factory=dict)
    described: list[dict[str, Any]] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    roundtrip: dict[str, float] | None = None


def make_priors(
    requests: Sequence[PriorRequest],
    store: PriorStore,
    settings: PriorSettings,
    load: Callable[[], Teacher],
    skips: SkipLog,
    *,
    measure_roundtrip: bool = False,
) -> MadePriors:
    """Make and store every requested prior that the store does not hold; what it holds is checked.

    Args:
        requests: from `plan_priors`; under several processes, this process's share.
        store: read first, written as priors come.
        settings: of the extraction.
        load: returns the teacher; called at most once, and only when something is missing.
        skips: receives damaged files that were re-made, and samples that got no prior.
        measure_roundtrip: invert and rebuild the first clip made here without guidance, and report the error.
    """
    made = MadePriors()
    described: dict[str, dict[str, Any]] = {}
    failed: dict[str, Exception] = {}
    teacher: Teacher | None = None
    for request in tqdm(requests, desc="priors", unit="clip", disable=not PartialState().is_main_process):
        sample, key = request.sample, request.key
        if key not in described and key not in failed:
            prior = _stored(store, request, skips)
            fresh = prior is None
            if prior is None:
                teacher = teacher or load()
                try:
                    frames = read_frames(request.video, num_frames=teacher.max_frames, min_frames=2).frames
                    prior = extract_prior(teacher, frames, request.text, **_keywords(settings))
                except (VideoError, PriorError) as error:
                    failed[key] = error
                else:
                    store.write(key, prior)
                    if measure_roundtrip and made.roundtrip is None:
                        made.roundtrip = _roundtrip(teacher, frames, request.text, settings.steps)
            if prior is not None:
                described[key] = {"key": key, "made_now": fresh, **prior.describe()}
        if key in failed:
            broken = isinstance(failed[key], VideoError)
            reason = "unreadable video" if broken else "no prior: the teacher cannot read it"
            skips.add(reason, id=sample.id, line=sample.line, detail=str(failed[key]))
            if broken:
                made.unusable.add(sample.id)
            continue
        made.keys[sample.id] = key
        made.described.append({"id": sample.id, "video": str(request.video), **described[key]})
    return made


def _roundtrip(teacher: Teacher, frames: np.ndarray, text: str, steps: int) -> dict[str, float]:
    """Relative errors of invert-then-rebuild: over the whole schedule, and over its lower 60 %."""
    latents, embeds = teacher.encode_video(frames).latents, teacher.encode_text(text).embeds
    whole = teacher.schedule(steps)
    errors = {"whole_schedule": roundtrip_error(teacher, latents, whole, embeds)}
    cut = 0.6 * (whole.timesteps[-1] + 1)
    if whole.timesteps[0] < cut:
        errors["short_of_zero_snr"] = roundtrip_error(teacher, latents, whole.below(int(cut)), embeds)
    return errors


def _keywords(settings: PriorSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in PriorSettings.__dataclass_fields__}


def _stored(store: PriorStore, request: PriorRequest, skips: SkipLog) -> MotionPrior | None:
    if request.key not in store:
        return None
    try:
        return store.read(request.key)
    except DamagedPrior as error:
        aside = store.set_aside(request.key)
        tqdm.write(
            f"damaged prior of sample {request.sample.id}: {error}; set aside as {aside.name}, making it anew"
        )
        skips.note("damaged priors made anew")
        return None


def load_samples(data: DataArguments, skips: SkipLog) -> list[Sample]:
    """Every usable sample of the data file, bad lines reported in `skips`.

    Raises:
        ValueError: the data file or the video folder is missing, or nothing in the file is usable.
    """
    assert data.data is not None
    seen: Counter[str] = Counter()
    samples = []
    for sample in islice(read_samples(data.data, data.video_root, skips), data.limit):
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            # Priors are looked up by id, so two samples must never share one.
            skips.note("repeated id, numbered")
            sample = replace(sample, id=f"{sample.id}#{seen[sample.id]}")
        samples.append(sample)
    return samples


def use_toy_defaults(data: DataArguments, prior: PriorArguments) -> ToyFolder | None:
    """Fill in the toy world for whatever was left out; returns it if any of it is used."""
    if prior.teacher is not None and data.data is not None:
        return None
    toy = default_toy()
    prior.teacher = prior.teacher or str(toy.teacher)
    if data.data is None:
        data.data, data.video_root = str(toy.train), str(toy.videos)
    return toy


def default_toy() -> ToyFolder:
    """The toy world of commands typed without arguments, made on first use by one process."""
    with PartialState().main_process_first():
        return build_toy(Path(DEFAULT_TOY))


def main(argv: list[str] | None = None) -> int:
    data, prior = parse_arguments(
        (DataArguments, PriorArguments), argv, prog="python -m motionenhancer.extract"
    )
    try:
        state = join_processes()
        settings = prior.settings()
        use_toy_defaults(data, prior)
        skips = SkipLog()
        samples = load_samples(data, skips)
        requests = plan_priors(samples, prior.teacher_id(state.device), settings, prior.prompt_source, skips)
        mine = requests[state.process_index :: state.num_processes]
        made = make_priors(
            mine,
            PriorStore(Path(prior.prior_dir)),
            settings,
            lambda: prior.load(state.device),
            skips,
            measure_roundtrip=prior.measure_roundtrip,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(made.keys)} samples have their prior in {prior.prior_dir}")
    if made.roundtrip:
        print(f"inversion error of the first clip: {made.roundtrip}")
    if skips.total:
        print(skips.summary())
    return 1 if skips.total else 0


if __name__ == "__main__":
    sys.exit(main())
