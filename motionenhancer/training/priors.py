"""The priors of a training run: which samples have one, and how those that are missing are made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..arguments import PriorArguments
from ..data import Sample, SkipLog
from ..extract import make_priors, plan_priors, share_requests
from ..extraction.digests import DigestCache
from ..extraction.planning import PriorRequest, request_priors
from ..online.arguments import OnlineArguments
from ..online.memory import BEFORE, TeacherMemory, measured_memory, teacher_memory
from ..online.priors import OnlineCounts, OnlinePriors
from ..online.start import measure_agreement, open_source, say_agreement
from ..prior import PriorSettings
from ..processes import from_main
from ..report import RunReport
from ..store import PriorStore
from ..vdm.plan import plan_teacher
from .arguments import StudentArguments


@dataclass(frozen=True)
class RunPriors(AbstractContextManager):
    """What a run knows of its priors. As a context it lets the teacher go at its end, if there is one.

    Attributes:
        samples: all that are trained on, with a prior or without.
        keys: sample id → key of its prior in the store.
        grids: (F, H, W) of all priors.
        requests: sample id → its prior, to be made while training.
        online: makes them.
    """

    samples: list[Sample]
    keys: dict[str, str] = field(default_factory=dict)
    grids: set[tuple[int, int, int]] = field(default_factory=set)
    requests: dict[str, PriorRequest] = field(default_factory=dict)
    online: OnlinePriors | None = None

    @property
    def any(self) -> bool:
        """Whether a sample has a prior, or is to have one."""
        return bool(self.keys or self.requests)

    def finish(
        self, report: RunReport, skips: SkipLog, total: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """After the last step: what was made while training goes into the report. All processes must call it.

        Raises:
            NoPriorError: priors were to be made while training, and none ever was.
        """
        if self.online is None:
            return
        self.online.judge(total, final=True)
        mine = (self.online.counts, self.online.skips, self.online.described, measured_memory())
        everyone = gather_object([mine])
        counts = sum((counts for counts, *_ in everyone), OnlineCounts())
        report.content["teacher"]["online"] = {
            **asdict(counts),
            "hidden_share": counts.hidden_share,
            "prefetch": self.online.prefetch,
            "memory": [memory for *_, memory in everyone],
        }
        described = {name: text for _, _, part, _ in everyone for name, text in part.items()}
        report.content["samples"] = [json.loads(described[s.id]) for s in self.samples if s.id in described]
        skips.merge(log for _, log, *_ in everyone)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.online is not None:
            self.online.close()


def extract_command(prior: PriorArguments, identity: Mapping[str, Any]) -> str:
    """The command that makes the priors a run wants, with every flag that is not its default.

    Args:
        prior: the run's.
        identity: of its report; `data` and `video_root` are read.
    """
    chosen = {name: identity[name] for name in ("data", "video_root") if identity.get(name) is not None}
    for one in fields(prior):
        value = getattr(prior, one.name)
        if value != one.default and value is not None:
            chosen[one.name] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    given = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "motionenhancer.extract", *given])


def collect_priors(
    samples: list[Sample],
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    how: OnlineArguments | None = None,
) -> RunPriors:
    """Priors for all samples that can have one, as `--prior_source` says.

    "store" takes what is stored. "hybrid" makes and keeps what is missing, while training or, told so,
    before: every process its share. "online" makes all while training and keeps none.

    Args:
        samples: of the data file.
        student: `prior_source`, `aligner` and `alignment_weight` are read.
        prior, settings: which teacher, how, and where priors are kept.
        skips: receives samples without a prior and why.
        report: receives the teacher and every prior's description.
        how: when and where priors are made.

    Raises:
        ValueError: priors are missing under `--prior_source store`, or nothing is left to align.
    """
    how = how or OnlineArguments()
    how.check(student.prior_source)
    state = PartialState()
    assert prior.teacher is not None
    report.content["teacher"] = {"path": prior.teacher}
    if student.prior_source == "online":
        requests = request_priors(samples, settings, prior.prompt_source, skips)
        if state.is_main_process:
            print(f"teacher {prior.teacher}: reads {len(requests)} clips while training, keeps no prior")
        return _while_training(samples, requests, None, student, prior, settings, skips, report, how)
    store, name = PriorStore(Path(prior.prior_dir)), prior.teacher_id(state.device)
    report.content["teacher"]["id"] = name
    # A folder that is only read from is not made here.
    writes = state.is_main_process and (student.prior_source != "store" or store.folder.is_dir())
    with DigestCache(store.folder, writes=writes) as cache:
        requests = plan_priors(samples, name, settings, prior.prompt_source, skips, cache=cache)
    # A process that looked later might find priors that another has made since.
    missing, none = _from_main(
        [
            sum(not store.settled(request.key) for request in requests),
            sum(request.key not in store for request in requests),
        ]
    )
    if state.is_main_process:
        refused = f", {none - missing} on record as without a prior" if none > missing else ""
        print(f"teacher {prior.teacher}: {len(requests) - none} priors stored, {missing} to make{refused}")
    if student.prior_source == "store" and missing:
        raise ValueError(
            f"--prior_source store: {missing} of {len(requests)} priors are missing in {prior.prior_dir}; "
            f"make them with\n  {extract_command(prior, report.identity)}\nor use --prior_source hybrid"
        )
    if missing and not how.priors_first:
        return _while_training(samples, requests, store, student, prior, settings, skips, report, how)
    return _beforehand(samples, requests, store, student, prior, settings, skips, report, how)


def plan_memory(
    student: StudentArguments, prior: PriorArguments, settings: PriorSettings, how: OnlineArguments
) -> TeacherMemory | None:
    """What the run's teacher will take, if it makes priors at all; no weight is read.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    if student.prior_source == "store" or not student.aligned:
        return None
    place = (
        BEFORE if how.priors_first else "on ranks of its own" if how.teacher_ranks else "beside the student"
    )
    return teacher_memory(prior, settings, PartialState().device, place=place)


def _from_main(values: list[Any]) -> list[Any]:
    broadcast_object_list(values)
    return values


def _beforehand(
    samples: list[Sample],
    requests: list[PriorRequest],
    store: PriorStore,
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    how: OnlineArguments,
) -> RunPriors:
    """Check what is stored, make what is missing, and let the teacher go.

    As while training, a sample without its prior stays: whether and in which order clips are trained on must
    not depend on when priors are made, or on λ.
    """
    state, mine = PartialState(), SkipLog()
    missing = from_main({request.key for request in requests if request.key not in store})
    made = make_priors(
        share_requests(requests, state.num_processes, missing=missing)[state.process_index],
        store,
        settings,
        lambda: prior.load(state.device),
        mine,
        measure_roundtrip=prior.measure_roundtrip,
        decode_workers=how.prior_workers,
    )
    gathered = gather_object([(made, mine)])
    everyone = [part for part, _ in gathered]
    skips.merge(log for _, log in gathered)
    keys = {k: v for part in everyone for k, v in part.keys.items()}
    report.content["teacher"]["roundtrip"] = next((p.roundtrip for p in everyone if p.roundtrip), None)
    report.content["samples"] = [entry for part in everyone for entry in part.described]
    grids = {tuple(entry["grid"]) for part in everyone for entry in part.described}
    _require_some(keys, samples, student, skips)
    return RunPriors(samples, keys, grids)


def _while_training(
    samples: list[Sample],
    requests: list[PriorRequest],
    store: PriorStore | None,
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    how: OnlineArguments,
) -> RunPriors:
    """Get the teacher ready; it stays until the end of the training."""
    assert prior.teacher is not None
    wanted = {request.sample.id: request for request in requests}
    _require_some(wanted, samples, student, skips)
    options = prior.identity(PartialState().device)
    grid = plan_teacher(prior.teacher, size=options["size"], frames=options["frames"]).grid
    source, roundtrip = open_source(prior, settings, how, requests, store)
    try:
        about = report.content["teacher"]
        about["roundtrip"], about["agreement"] = roundtrip, None
        if settings.mode == "renoise" and how.agreement_clips:
            about["agreement"] = measure_agreement(source, requests, settings, how.agreement_clips, skips)
            if PartialState().is_main_process:
                print(say_agreement(about["agreement"], settings))
        online = OnlinePriors(
            source, prefetch=how.prior_prefetch, grid=grid if student.aligner == "mlp" else None
        )
    except BaseException:
        source.close()
        raise
    return RunPriors(samples, {}, {grid}, wanted, online)


def _require_some(
    found: dict[str, Any], samples: list[Sample], student: StudentArguments, skips: SkipLog
) -> None:
    if not found and student.alignment_weight != 0:
        raise ValueError(
            f"none of the {len(samples)} samples has a prior, so nothing would be aligned; "
            f"use --alignment_weight 0 for plain fine-tuning. {skips.summary()}"
        )
