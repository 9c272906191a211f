"""The priors of a training run: which samples have one, and how those that are missing are made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..alignment.online import OnlineCounts, OnlinePriors
from ..costs import BEFORE, TeacherCost, measured_memory, teacher_cost
from ..data import Sample, SkipLog
from ..data.video import VideoError
from ..flags import flag_of
from ..priors.comparison import measure_agreement, say_agreement
from ..priors.digests import DigestCache
from ..priors.engine import Engine
from ..priors.maker import LocalMaker, Made, PriorMaker, RefusedClip, Stored, make_all, refusal_of
from ..priors.prior import PARTLY_UNKNOWN, PriorError, PriorSettings
from ..priors.requests import PriorRequest, request_priors
from ..priors.storage import PriorStore, prior_keys
from ..processes import from_main
from ..report.run_report import RunReport
from ..settings import MakerArguments, OnlineArguments, PriorArguments, StudentArguments
from ..teachers import Teacher
from ..teachers.plan import plan_teacher
from ..teachers.text_cache import ready_teacher


@dataclass(frozen=True)
class RunPriors:
    """What a run knows of its priors.

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
        """Put what was made while training into the report; all processes call it after the last step.

        Raises:
            NoPriorError: priors were to be made while training, and none ever was.
        """
        online = self.online
        if online is None:
            return
        online.judge(total, final=True)
        mine = (online.counts, online.skips, online.described, online.roundtrip, measured_memory())
        everyone = gather_object([mine])
        counts = sum((counts for counts, *_ in everyone), OnlineCounts())
        about = report.content["teacher"]
        about["roundtrip"] = next((found for *_, found, _ in everyone if found), None)
        about["online"] = {
            **asdict(counts),
            "hidden_share": counts.hidden_share,
            "prefetch": online.prefetch,
            "memory": [memory for *_, memory in everyone],
        }
        described = {name: text for _, _, part, *_ in everyone for name, text in part.items()}
        report.content["samples"] = [json.loads(described[s.id]) for s in self.samples if s.id in described]
        skips.merge(log for _, log, *_ in everyone)


def extract_command(prior: PriorArguments, settings: PriorSettings, identity: Mapping[str, Any]) -> str:
    """Return the command that makes the priors of a run, with every flag that is not its default.

    Args:
        prior, settings: the run's.
        identity: of its report; `data` and `video_root` are read.
    """
    chosen = {name: identity[name] for name in ("data", "video_root") if identity.get(name) is not None}
    for given in (prior, settings):
        for one in fields(given):
            value = getattr(given, one.name)
            if value != one.default and value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
                chosen[flag_of(one)] = text
    flags = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "motionenhancer.extract", *flags])


@dataclass(frozen=True)
class _Plan:
    """What the ways of getting priors have in common."""

    samples: list[Sample]
    student: StudentArguments
    prior: PriorArguments
    settings: PriorSettings
    how: OnlineArguments
    skips: SkipLog
    report: RunReport


@contextmanager
def open_priors(
    samples: list[Sample],
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    how: OnlineArguments | None = None,
    where: MakerArguments | None = None,
) -> Iterator[RunPriors]:
    """Get priors for all samples that can have one, as `--prior_source` says.

    The teacher, if there is one, goes with the context.

    "store" takes what is stored. "hybrid" makes and keeps what is missing, while training or, told so,
    before: every process its share. "online" makes all while training and keeps none.

    Args:
        samples: of the data file.
        student: `prior_source`, `aligner` and `alignment_weight` are read.
        prior, settings: which teacher, how, and where priors are kept.
        skips: receives samples without a prior and why.
        report: receives the teacher and every prior's description.
        how, where: when and where priors are made.

    Raises:
        ValueError: priors are missing under `--prior_source store`, or nothing is left to align.
    """
    plan = _Plan(samples, student, prior, settings, how or OnlineArguments(), skips, report)
    plan.how.check(student.prior_source)
    assert prior.teacher is not None
    report.content["teacher"] = {"path": prior.teacher}
    with ExitStack() as stack:
        engine = stack.enter_context((where or MakerArguments()).open())
        if student.prior_source == "online":
            pairs = list(request_priors(samples, prior.prompt_source, skips))
            if PartialState().is_main_process:
                print(f"teacher {prior.teacher}: reads {len(pairs)} clips while training, keeps no prior")
            yield _while_training(plan, pairs, None, engine, stack)
            return
        store, name = PriorStore(Path(prior.prior_dir)), prior.teacher_id(engine.device)
        report.content["teacher"]["id"] = name
        pairs = _planned(plan, store, name)
        # A process that looked later might find priors that another has made since.
        missing, none = from_main(
            [
                sum(not store.settled(request.key) for _, request in pairs),
                sum(request.key not in store for _, request in pairs),
            ]
        )
        if PartialState().is_main_process:
            refused = f", {none - missing} on record as without a prior" if none > missing else ""
            print(f"teacher {prior.teacher}: {len(pairs) - none} priors stored, {missing} to make{refused}")
        if student.prior_source == "store" and missing:
            raise ValueError(
                f"--prior_source store: {missing} of {len(pairs)} priors are missing in {prior.prior_dir}; "
                f"make them with\n  {extract_command(prior, settings, report.identity)}\n"
                "or use --prior_source hybrid"
            )
        if missing and not plan.how.priors_first:
            yield _while_training(plan, pairs, store, engine, stack)
        else:
            yield _beforehand(plan, pairs, store, name, engine)


def _planned(plan: _Plan, store: PriorStore, teacher_id: str) -> list[tuple[Sample, PriorRequest]]:
    # A folder that is only read from is not made here.
    writes = PartialState().is_main_process and (
        plan.student.prior_source != "store" or store.folder.is_dir()
    )
    name = prior_keys(teacher_id, plan.settings)
    with DigestCache(store.folder, writes=writes) as cache:
        return list(
            request_priors(plan.samples, plan.prior.prompt_source, plan.skips, name=name, digest=cache.digest)
        )


def plan_memory(
    student: StudentArguments, prior: PriorArguments, settings: PriorSettings, how: OnlineArguments
) -> tuple[TeacherCost, str] | None:
    """Return what the run's teacher will take and when, if it makes priors at all; no weight is read.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    if student.prior_source == "store" or not student.aligned:
        return None
    assert prior.teacher is not None
    place = BEFORE if how.priors_first else "beside the student"
    options = prior.cost_options(PartialState().device, cached=place != BEFORE)
    return teacher_cost(prior.teacher, settings, **options), place


def _beforehand(
    plan: _Plan, pairs: list[tuple[Sample, PriorRequest]], store: PriorStore, teacher_id: str, engine: Engine
) -> RunPriors:
    """Check what is stored, make what is missing, and let the teacher go.

    As while training, a sample without its prior stays: whether and in which order clips are trained on must
    not depend on when priors are made, or on λ.
    """
    state, mine = PartialState(), SkipLog()
    prior, settings = plan.prior, plan.settings
    # By the key, so that the samples of one prior fall to one process.
    share = [pair for pair in pairs if int(pair[1].key[:8], 16) % state.num_processes == state.process_index]
    maker = Stored(
        store,
        engine.maker(prior.absolute().load, teacher_id, settings, roundtrip=prior.measure_roundtrip),
        prior_keys(teacher_id, settings),
        strict=True,
    )
    described: list[dict[str, Any]] = []
    roundtrip = None
    bar = tqdm(desc="priors", unit="prior", total=len(share), disable=not state.is_main_process)
    with closing(maker), bar:
        for sample, request, found in make_all(share, maker):
            bar.update()
            if not isinstance(found, Made):
                _leave_out(sample, found, mine)
                continue
            if found.damaged:
                mine.note("damaged priors made anew")
            if found.prior.unknown:
                mine.note(PARTLY_UNKNOWN)
            roundtrip = roundtrip or found.roundtrip
            about = {"id": sample.id, "video": str(request.video), "key": request.key}
            described.append({**about, "made_now": found.fresh, **found.prior.describe()})
    everyone = gather_object([(described, mine, roundtrip)])
    described = [entry for part, *_ in everyone for entry in part]
    plan.skips.merge(log for _, log, _ in everyone)
    keys = {entry["id"]: entry["key"] for entry in described}
    plan.report.content["teacher"]["roundtrip"] = next((found for *_, found in everyone if found), None)
    order = {sample.id: place for place, sample in enumerate(plan.samples)}
    plan.report.content["samples"] = sorted(described, key=lambda entry: order[entry["id"]])
    _require_some(keys, plan)
    return RunPriors(plan.samples, keys, {tuple(entry["grid"]) for entry in described})


def _leave_out(sample: Sample, error: Exception, skips: SkipLog) -> None:
    reason, detail = "no prior: the teacher failed on it", str(error) or type(error).__name__
    if isinstance(error, VideoError | PriorError | RefusedClip):
        refusal = refusal_of(error)
        reason, detail = refusal.reason, refusal.detail
    skips.add(reason, id=sample.id, line=sample.line, detail=detail)


def _while_training(
    plan: _Plan,
    pairs: list[tuple[Sample, PriorRequest]],
    store: PriorStore | None,
    engine: Engine,
    stack: ExitStack,
) -> RunPriors:
    """Get the teacher ready; it stays until the end of the training."""
    prior, settings, how = plan.prior, plan.settings, plan.how
    assert prior.teacher is not None
    wanted = {sample.id: request for sample, request in pairs}
    _require_some(wanted, plan)
    options = prior.identity(engine.device)
    grid = plan_teacher(prior.teacher, size=options["size"], frames=options["frames"]).grid
    name = prior.teacher_id(engine.device)
    texts = sorted({request.text for request in wanted.values()})
    maker: PriorMaker = engine.maker(
        partial(_ready, prior.absolute(), settings, texts), name, settings, roundtrip=prior.measure_roundtrip
    )
    if isinstance(maker, LocalMaker):
        # All processes load at once: some wait for others' texts.
        maker.ready()
    if store is not None:
        maker = Stored(store, maker, prior_keys(name, settings))
    online = OnlinePriors(
        maker, prefetch=how.prior_prefetch, grid=grid if plan.student.aligner == "mlp" else None
    )
    stack.callback(online.close)
    about = plan.report.content["teacher"]
    about["roundtrip"], about["agreement"] = None, None
    if settings.mode == "renoise" and how.agreement_clips:
        about["agreement"] = measure_agreement(maker, pairs, settings, how.agreement_clips, plan.skips)
        if PartialState().is_main_process:
            print(say_agreement(about["agreement"], settings))
    return RunPriors(plan.samples, {}, {grid}, wanted, online)


def _ready(prior: PriorArguments, settings: PriorSettings, texts: list[str], device: torch.device) -> Teacher:
    """Load a teacher, with its texts encoded beforehand if there is a cache of them."""
    cache = prior.texts(device)
    if cache is None:
        return prior.load(device)
    state = PartialState()
    return ready_teacher(
        partial(prior.load, device),
        cache,
        texts,
        index=state.process_index,
        count=state.num_processes,
        wait=state.wait_for_everyone,
    )


def _require_some(found: Mapping[str, Any], plan: _Plan) -> None:
    if not found and plan.student.alignment_weight != 0:
        raise ValueError(
            f"none of the {len(plan.samples)} samples has a prior, so nothing would be aligned; "
            f"use --alignment_weight 0 for plain fine-tuning. {plan.skips.summary()}"
        )
