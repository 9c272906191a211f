"""Getting the teacher of a training ready: loaded, its texts encoded, checked, its agreement measured."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from accelerate import PartialState
from accelerate.utils import gather_object

from ..agreement import average, compare_priors
from ..arguments import PriorArguments
from ..data import SkipLog
from ..data.video import VideoError
from ..extraction.making import decode, inversion_errors
from ..extraction.planning import PriorRequest
from ..prior import PriorSettings
from ..store import PriorStore
from ..vdm import Teacher
from .arguments import OnlineArguments
from .ranks import RemoteTeacher, current
from .teacher import ready_teacher
from .thread import PriorSource, ReadPrior, TeacherThread


def open_source(
    prior: PriorArguments,
    settings: PriorSettings,
    online: OnlineArguments,
    requests: Sequence[PriorRequest],
    store: PriorStore | None,
) -> tuple[PriorSource, dict[str, float] | None]:
    """A teacher ready to read, in a thread of this process or on ranks of its own, and its inversion error.

    Args:
        prior: how the teacher is loaded.
        settings: of the priors.
        online: where it runs.
        requests: all that may be asked for; their texts are encoded first where there is a text cache.
        store: read first and written; None keeps nothing.

    Raises:
        ValueError, OSError: the teacher cannot be loaded, or not be read as `settings` say.
    """
    ranks = current()
    texts = sorted({request.text for request in requests})
    if ranks is not None:
        remote = RemoteTeacher(
            ranks, prior, settings, store=store, decode_workers=online.prior_workers, texts=texts
        )
        return remote, None
    state = PartialState()
    teacher = ready_teacher(
        prior,
        settings,
        state.device,
        texts,
        index=state.process_index,
        count=state.num_processes,
        wait=state.wait_for_everyone,
    )
    roundtrip = None
    if prior.measure_roundtrip and state.is_main_process:
        roundtrip = _first_roundtrip(teacher, requests, settings.steps)
    return TeacherThread(teacher, settings, store=store, decode_workers=online.prior_workers), roundtrip


def _first_roundtrip(
    teacher: Teacher, requests: Sequence[PriorRequest], steps: int
) -> dict[str, float] | None:
    """Inversion error of the first of a few clips that can be read."""
    for request in requests[:4]:
        with suppress(VideoError):
            return inversion_errors(teacher, decode(request, teacher), request.text, steps)
    return None


def measure_agreement(
    source: PriorSource,
    requests: Sequence[PriorRequest],
    settings: PriorSettings,
    clips: int,
    skips: SkipLog,
) -> dict[str, float] | None:
    """How far single-pass priors of a run's first clips agree with the full procedure; None if none was read.

    Every process reads its share of them; all get the mean. Clips that could not be read are counted in
    `skips`, each with its reason.

    Returns:
        What `compare_priors` returns, meaned over the clips, and `time_share`, `evaluations`,
        `full_evaluations` and `clips`.
    """
    state = PartialState()
    distinct = list({(r.video, r.text): r for r in requests}.values())[:clips]
    mine = distinct[state.process_index :: state.num_processes]
    full = replace(settings, mode="reconstruct")
    asked: list[tuple[Future[ReadPrior], Future[ReadPrior]]] = [
        # Settings of their own keep them out of the store.
        (source.submit(request, full), source.submit(request, replace(settings)))
        for request in mine
    ]
    rows, left_out = [], SkipLog()
    for request, (one, other) in zip(mine, asked, strict=True):
        try:
            whole, quick = one.result(), other.result()
        except Exception as error:
            sample, detail = request.sample, str(error) or type(error).__name__
            left_out.add("left out of the agreement", id=sample.id, line=sample.line, detail=detail)
            continue
        rows.append(
            {
                **compare_priors(whole.prior, quick.prior),
                "time_share": quick.seconds / whole.seconds,
                "evaluations": quick.prior.evaluations,
                "full_evaluations": whole.prior.evaluations,
            }
        )
    everyone = gather_object([(rows, left_out)])
    skips.merge(log for _, log in everyone)
    rows = [row for found, _ in everyone for row in found]
    if not rows:
        return None
    return {**{name: average([row[name] for row in rows]) for name in rows[0]}, "clips": len(rows)}


def say_agreement(found: dict[str, float] | None, settings: PriorSettings) -> str:
    """A line for people."""
    if found is None:
        return "agreement of single-pass priors: no clip could be read"
    return (
        f"single-pass priors at level {settings.noise_level} against the full procedure, mean over "
        f"{found['clips']:.0f} of the run's clips: head rank {found['head_rank']:.2f}, same heads "
        f"{found['heads']:.0%}, same words {found['tokens']:.0%}, cosine of rows {found['cosine']:.3f}; "
        f"{found['evaluations']:.0f} instead of {found['full_evaluations']:.0f} evaluations, "
        f"{found['time_share']:.0%} of the time"
    )
