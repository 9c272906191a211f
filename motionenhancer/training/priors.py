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
from ..data.digests import DigestCache
from ..flags import flag_of
from ..priors.comparison import measure_agreement, say_agreement
from ..priors.engine import Engine
from ..priors.maker import LocalMaker, Made, PriorMaker, Stored, count_failed, count_made, make_all
from ..priors.prior import PriorSettings
from ..priors.requests import PriorRequest, request_priors
from ..priors.storage import PriorStore, prior_keys
from ..processes import from_main
from ..report.run_report import RunReport
from ..settings import MakerArguments, OnlineArguments, PriorArguments, StudentArguments
from ..teachers import Teacher
from ..teachers.plan import plan_teacher


@dataclass(frozen=True)
class RunPriors:
    """The state of a run's priors.

    Attributes:
        samples: all that are trained on, with a prior or without.
        keys, requests: sample id → key of its prior in the store, or its prior to be made while training.
        grids: (F, H, W) of all priors.
        online: makes them.
    """

    samples: list[Sample]
    keys: dict[str, str] = field(default_factory=dict)
    grids: set[tuple[int, int, int]] = field(default_factory=set)
    requests: dict[str, PriorRequest] = field(default_factory=dict)
    online: OnlinePriors | None = None

    @property
    def any(self) -> bool:
        """Whether a sample has a prior, or a request of one."""
        return bool(self.keys or self.requests)

    def finish(
        self, report: RunReport, skips: SkipLog, total: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Report the priors made while training; all processes call it after the last step.

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
    """The command that makes the priors of a run, with every flag that is not its default."""
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
class _Run:
    """What getting the priors of a run needs to know; see `open_priors`."""

    samples: list[Sample]
    student: StudentArguments
    prior: PriorArguments
    settings: PriorSettings
    how: OnlineArguments
    engine: Engine
    skips: SkipLog
    report: RunReport

    @property
    def teacher_id(self) -> str:
        return self.prior.teacher_id(self.engine.device)

    def maker(
        self, load: Callable[[torch.device], Teacher], store: PriorStore | None, strict: bool
    ) -> PriorMaker:
        """A maker that keeps what it makes in a store, if there is one."""
        roundtrip, name = self.prior.measure_roundtrip, self.teacher_id
        maker = self.engine.maker(load, name, self.settings, roundtrip=roundtrip)
        if isinstance(maker, LocalMaker) and not strict:
            # All processes load at once: some wait for others' texts.
            maker.ready()
        return (
            maker if store is None else Stored(store, maker, prior_keys(name, self.settings), strict=strict)
        )

    def require(self, found: Mapping[str, Any]) -> None:
        """Raise where there is nothing to align."""
        if not found and self.student.alignment_weight != 0:
            raise ValueError(
                f"none of the {len(self.samples)} samples has a prior, so no sample would be aligned; "
                f"use --alignment_weight 0 for plain fine-tuning. {self.skips.summary()}"
            )


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

    The teacher, if there is one, goes with the context. "store" takes what is stored. "hybrid" makes and
    keeps
    what is missing, while training or, told so, before: every process its share. "online" makes all while
    training and keeps none. `skips` receives samples without a prior, `report` the teacher and every prior's
    description.

    Raises:
        ValueError: priors are missing under `--prior_source store`, or nothing is left to align.
    """
    how, source, main = how or OnlineArguments(), student.prior_source, PartialState().is_main_process
    how.check(source)
    assert prior.teacher is not None
    report.content["teacher"] = {"path": prior.teacher}
    with ExitStack() as stack:
        engine = stack.enter_context((where or MakerArguments()).open())
        run = _Run(samples, student, prior, settings, how, engine, skips, report)
        if source == "online":
            pairs = list(request_priors(samples, prior.prompt_source, skips))
            if main:
                print(f"teacher {prior.teacher}: reads {len(pairs)} clips while training and keeps no prior")
            yield _while_training(run, pairs, None, stack)
            return
        store = PriorStore(Path(prior.prior_dir))
        report.content["teacher"]["id"] = run.teacher_id
        # A folder that is only read is not created.
        writes = main and (source != "store" or store.folder.is_dir())
        with DigestCache(store.folder, writes=writes) as cache:
            name = prior_keys(run.teacher_id, settings)
            pairs = list(request_priors(samples, prior.prompt_source, skips, name=name, digest=cache.digest))
        # A process that looks later might find priors that another process made meanwhile.
        missing, none = from_main(
            [
                sum(not store.settled(request.key) for _, request in pairs),
                sum(request.key not in store for _, request in pairs),
            ]
        )
        if main:
            refused = f", {none - missing} on record as without a prior" if none > missing else ""
            print(f"teacher {prior.teacher}: {len(pairs) - none} priors stored, {missing} to make{refused}")
        if source == "store" and missing:
            given = report.identity
            commands = "\n  ".join(
                extract_command(prior, settings, {"data": given[data], "video_root": given.get(root)})
                for data, root in (("data", "video_root"), ("eval_data", "eval_video_root"))
                if given.get(data) is not None
            )
            raise ValueError(
                f"--prior_source store: {missing} of {len(pairs)} priors are missing in {prior.prior_dir}; "
                f"make them with\n  {commands}\n"
                "or use --prior_source hybrid"
            )
        if missing and not how.priors_first:
            yield _while_training(run, pairs, store, stack)
        else:
            yield _beforehand(run, pairs, store)


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


def _beforehand(run: _Run, pairs: list[tuple[Sample, PriorRequest]], store: PriorStore) -> RunPriors:
    """Check the stored priors, make the missing ones, and free the teacher.

    As while training, a sample without its prior stays: whether and in which order clips are trained on must
    not depend on when priors are made, or on λ.
    """
    state, mine = PartialState(), SkipLog()
    # By the key, so that the samples of one prior fall to one process.
    share = [pair for pair in pairs if int(pair[1].key[:8], 16) % state.num_processes == state.process_index]
    maker = run.maker(run.prior.absolute().load, store, strict=True)
    described, roundtrip = [], None
    bar = tqdm(desc="priors", unit="prior", total=len(share), disable=not state.is_main_process)
    with closing(maker), bar:
        for sample, request, found in make_all(share, maker):
            bar.update()
            if isinstance(found, Made):
                count_made(found, mine)
                roundtrip = roundtrip or found.roundtrip
                described.append(found.describe(sample, request))
            else:
                count_failed(sample, found, mine)
    everyone = gather_object([(described, mine, roundtrip)])
    described = [entry for part, *_ in everyone for entry in part]
    run.skips.merge(log for _, log, _ in everyone)
    keys = {entry["id"]: entry["key"] for entry in described}
    run.report.content["teacher"]["roundtrip"] = next((found for *_, found in everyone if found), None)
    order = {sample.id: place for place, sample in enumerate(run.samples)}
    run.report.content["samples"] = sorted(described, key=lambda entry: order[entry["id"]])
    run.require(keys)
    return RunPriors(run.samples, keys, {tuple(entry["grid"]) for entry in described})


def _while_training(
    run: _Run, pairs: list[tuple[Sample, PriorRequest]], store: PriorStore | None, stack: ExitStack
) -> RunPriors:
    """Get the teacher ready; it stays until the end of the training."""
    prior, settings, how = run.prior, run.settings, run.how
    assert prior.teacher is not None
    wanted = {sample.id: request for sample, request in pairs}
    run.require(wanted)
    options = prior.identity(run.engine.device)
    grid = plan_teacher(prior.teacher, size=options["size"], frames=options["frames"]).grid
    texts = sorted({request.text for request in wanted.values()})
    maker = run.maker(partial(_ready, prior.absolute(), texts), store, strict=False)
    online = OnlinePriors(
        maker, prefetch=how.prior_prefetch, grid=grid if run.student.aligner == "mlp" else None
    )
    stack.callback(online.close)
    about = run.report.content["teacher"]
    about["roundtrip"], about["agreement"] = None, None
    if settings.mode == "renoise" and how.agreement_clips:
        about["agreement"] = measure_agreement(maker, pairs, settings, how.agreement_clips, run.skips)
        if PartialState().is_main_process:
            print(say_agreement(about["agreement"], settings))
    return RunPriors(run.samples, {}, {grid}, wanted, online)


def _ready(prior: PriorArguments, texts: list[str], device: torch.device) -> Teacher:
    """Load a teacher; with a cache of its texts, fill it and free the text encoder."""
    cache = prior.texts(device)
    if cache is None:
        return prior.load(device)
    state = PartialState()
    # Divide the texts first: a process that looks later finds what another has written meanwhile.
    mine = [*texts, ""][state.process_index :: state.num_processes]
    missing = [text for text in mine if cache.read(text) is None]
    teacher = prior.load(device, text_encoder=bool(missing))
    teacher.drop_encoder(missing)
    state.wait_for_everyone()
    return teacher
