"""The priors of a training run: which samples have a prior, and how missing priors are made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..alignment.online import OnlineCounts, OnlinePriors
from ..costs import BEFORE, TeacherCost, measured_memory, teacher_cost
from ..data import Sample, SkipLog
from ..data.digests import DigestCache
from ..flags import flag_of
from ..priors.arguments import PriorArguments
from ..priors.combination import Combined
from ..priors.comparison import measure_agreement, say_agreement
from ..priors.engine import Engine, MakerArguments
from ..priors.extraction import ExtractionRecord
from ..priors.maker import LocalMaker, Made, PriorMaker, Stored, count_failed, count_made, make_all
from ..priors.prior_settings import PriorSettings
from ..priors.reader import Source
from ..priors.requests import PriorRequest
from ..priors.storage import PriorStore
from ..processes import from_main
from ..report.run_report import RunReport
from ..settings import OnlineArguments, StudentArguments
from ..teachers import Teacher


@dataclass(frozen=True)
class RunPriors:
    """The state of a run's priors.

    Attributes:
        samples: all training samples, with or without a prior.
        keys, requests: sample id → key of its prior in the store, or request of its prior during training.
        grids: (F, H, W) of all priors.
        online: makes the requested priors.
    """

    samples: list[Sample]
    keys: dict[str, str] = field(default_factory=dict)
    grids: set[tuple[int, int, int]] = field(default_factory=set)
    requests: dict[str, PriorRequest] = field(default_factory=dict)
    online: OnlinePriors | None = None

    @property
    def any(self) -> bool:
        """Whether any sample has a prior or a request."""
        return bool(self.keys or self.requests)

    def finish(
        self, report: RunReport, skips: SkipLog, total: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Report the priors made during training. All processes call it after the last step.

        Raises:
            NoPriorError: priors were requested during training, but none was made.
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
    """The command that makes the priors of a run, with all non-default flags."""
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
    """The arguments for getting the priors of a run; see `open_priors`."""

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

    @property
    def name(self) -> Callable[[str, str], str]:
        return self.prior.name(self.engine.device, self.settings)

    def maker(
        self, load: Callable[[torch.device], Teacher | Source], store: PriorStore | None, strict: bool
    ) -> PriorMaker:
        """A maker that stores its priors, if there is a store."""
        settings, roundtrip = self.prior.reading(self.settings), self.prior.measure_roundtrip
        maker = self.engine.maker(load, self.teacher_id, settings, roundtrip=roundtrip)
        if isinstance(maker, LocalMaker) and not strict:
            # All processes load at the same time: some wait for texts that others embed.
            maker.ready()
        if store is None:
            return maker
        return Stored(store, maker, self.name, str(self.prior.teacher), strict=strict)

    def count_missing(self, pairs: Pairs, store: PriorStore) -> int:
        """Print how many priors are stored and missing; return the number of priors to make.

        Raises:
            ValueError: priors are missing with `--prior_source store`.
        """
        # A process that looks later might find priors that another process made meanwhile.
        missing, none = from_main(
            [
                sum(not store.settled(request.key) for _, request in pairs),
                sum(request.key not in store for _, request in pairs),
            ]
        )
        prior = self.prior
        if PartialState().is_main_process:
            refused = f", {none - missing} on record as without a prior" if none > missing else ""
            print(f"teacher {prior.teacher}: {len(pairs) - none} priors stored, {missing} to make{refused}")
        if self.student.prior_source == "store" and missing:
            given = self.report.identity
            commands = "\n  ".join(
                extract_command(prior, self.settings, {"data": given[data], "video_root": given.get(root)})
                for data, root in (("data", "video_root"), ("eval_data", "eval_video_root"))
                if given.get(data) is not None
            )
            raise ValueError(
                f"--prior_source store: {missing} of {len(pairs)} priors are missing in {prior.prior_dir}; "
                f"make them with\n  {commands}\n"
                "or use --prior_source hybrid"
            )
        return missing

    def make(self, pairs: Pairs, store: PriorStore) -> list[dict[str, Any]]:
        """Check stored priors and make missing ones; return the descriptions of all processes' priors."""
        state, mine = PartialState(), SkipLog()
        # By the key, so that the samples of one prior fall to one process.
        share = [p for p in pairs if int(p[1].key[:8], 16) % state.num_processes == state.process_index]
        maker = self.maker(self.prior.absolute().load, store, strict=True)
        described, roundtrip = [], None
        bar = tqdm(desc="priors", unit="prior", total=len(share), disable=not state.is_main_process)
        with closing(maker), bar:
            for sample, request, found in make_all(share, maker):
                bar.update()
                if isinstance(found, Made):
                    count_made(sample, found, mine)
                    roundtrip = roundtrip or found.roundtrip
                    described.append(found.describe(sample, request))
                else:
                    count_failed(sample, found, mine)
        everyone = gather_object([(described, mine, roundtrip)])
        self.skips.merge(log for _, log, _ in everyone)
        about = self.report.content["teacher"]
        about["roundtrip"] = about.get("roundtrip") or next((found for *_, found in everyone if found), None)
        return [entry for part, *_ in everyone for entry in part]

    def require(self, found: Mapping[str, Any]) -> None:
        """Raise if there is nothing to align."""
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

    The teacher, if there is one, is freed at the end of the context. "store" takes only stored priors.
    "hybrid" makes missing priors and stores them: during training, or before it if `how` says so. Then every
    process makes its share. "online" makes all priors during training and stores none. `skips` receives the
    samples without a prior. `report` receives the teacher and the description of every prior.

    Raises:
        ValueError: priors are missing with `--prior_source store`, or nothing is left to align.
    """
    how, where = how or OnlineArguments(), where or MakerArguments()
    source, main = student.prior_source, PartialState().is_main_process
    how.check(source)
    report.content["teacher"] = {"path": prior.teacher}
    with ExitStack() as stack:
        engine = stack.enter_context(where.open())
        runs = [_Run(samples, student, one, settings, how, engine, skips, report) for one in prior.each()]
        if source == "online":
            asked = _ask(runs)
            if main:
                for run, pairs in zip(runs, asked, strict=True):
                    teacher = f"teacher {run.prior.teacher}"
                    print(f"{teacher}: reads {len(pairs)} clips while training and keeps no prior")
            yield _while_training(prior, runs, asked, None, stack)
            return
        store = PriorStore(Path(prior.prior_dir))
        ids = [run.teacher_id for run in runs]
        report.content["teacher"]["id"] = ids if len(ids) > 1 else ids[0]
        # A folder that is only read is not created.
        writes = main and (source != "store" or store.folder.is_dir())
        with DigestCache(store.folder, writes=writes) as cache:
            asked = _ask(runs, cache)
        missing = sum(run.count_missing(pairs, store) for run, pairs in zip(runs, asked, strict=True))
        if missing and main:
            given, made = report.identity, {"run": str(report.folder)}
            record = ExtractionRecord.of(prior, settings, engine.device, given, **made)
            for place, finished in enumerate(record.finished):
                # If the store cannot be written, the priors are still used.
                with suppress(OSError):
                    if finished is None:
                        record.write(place, "training", {})
        if missing and not how.priors_first and not prior.waits(where):
            yield _while_training(prior, runs, asked, store, stack)
        else:
            yield _beforehand(prior, runs, asked, store)


def plan_memory(
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    how: OnlineArguments,
    where: MakerArguments,
) -> list[tuple[TeacherCost, str]]:
    """Return the memory of each video model of the run, and when it is needed. No weight is read.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    if student.prior_source == "store" or not student.aligned:
        return []
    place = BEFORE if how.priors_first or prior.waits(where) else "beside the student"
    device, cached = PartialState().device, place != BEFORE
    return [
        (teacher_cost(one.teacher, settings, **one.cost_options(device, cached=cached)), place)
        for one in prior.each()
        if one.source is None
    ]


Pairs = list[tuple[Sample, PriorRequest]]


def _ask(runs: list[_Run], cache: DigestCache | None = None) -> list[Pairs]:
    """Return the requests for each teacher; with a cache of digests, they have keys."""
    found: list[Pairs] = []
    for run in runs:
        # Several teachers mostly refuse the same samples: each sample and reason counts once.
        log = SkipLog(shout=0) if found else run.skips
        names = {} if cache is None else {"name": run.name, "digest": cache.digest}
        found.append(list(run.prior.requests(run.samples, log, **names)))
        if log is not run.skips:
            known = {(entry.id, entry.reason) for entry in run.skips.entries}
            for id, line, reason, detail in log.entries:
                if (id, reason) not in known:
                    run.skips.add(reason, id=id, line=line, detail=detail)
    return found


def _beforehand(prior: PriorArguments, runs: list[_Run], asked: list[Pairs], store: PriorStore) -> RunPriors:
    """Check the stored priors and make the missing ones with one teacher after the other; free each teacher.

    A sample without a prior stays, as with priors made during training: the samples and their order must not
    depend on when priors are made, or on λ.
    """
    report, samples = runs[0].report.content, runs[0].samples
    described = [run.make(pairs, store) for run, pairs in zip(runs, asked, strict=True)]
    common = prior.common_grid(runs[0].engine.device) if len(runs) > 1 else None
    named = [{entry["id"]: entry for entry in part} for part in described]
    keys: dict[str, str] = {}
    grids = set()
    for sample in samples:
        found = [part.get(sample.id) for part in named]
        first = next((entry for entry in found if entry is not None), None)
        if first is not None:
            keys[sample.id] = "+".join("" if entry is None else entry["key"] for entry in found)
            grids.add(common or tuple(first["grid"]))
    order = {sample.id: place for place, sample in enumerate(samples)}
    everything = [entry for part in described for entry in part]
    report["samples"] = sorted(everything, key=lambda entry: order[entry["id"]])
    runs[0].require(keys)
    return RunPriors(samples, keys, grids)


def _while_training(
    prior: PriorArguments,
    runs: list[_Run],
    asked: list[Pairs],
    store: PriorStore | None,
    stack: ExitStack,
) -> RunPriors:
    """Prepare the teachers; they stay until the end of the training."""
    run, settings, how = runs[0], runs[0].settings, runs[0].how
    wanted = _wanted(run.samples, asked)
    run.require(wanted)
    grid = prior.common_grid(run.engine.device)
    assert grid is not None
    makers: list[PriorMaker] = []
    for one, pairs in zip(runs, asked, strict=True):
        texts = sorted({request.text for _, request in pairs})
        makers.append(one.maker(partial(_ready, one.prior.absolute(), texts), store, strict=False))
    maker = makers[0] if len(makers) == 1 else Combined(makers, prior.weights(), grid)
    online = OnlinePriors(
        maker, prefetch=how.prior_prefetch, grid=grid if run.student.aligner == "mlp" else None
    )
    stack.callback(online.close)
    about = run.report.content["teacher"]
    about["roundtrip"], about["agreement"] = None, None
    video = len(runs) == 1 and run.prior.source is None
    if video and settings.mode == "renoise" and how.agreement_clips:
        about["agreement"] = measure_agreement(maker, asked[0], settings, how.agreement_clips, run.skips)
        if PartialState().is_main_process:
            print(say_agreement(about["agreement"], settings))
    return RunPriors(run.samples, {}, {grid}, wanted, online)


def _wanted(samples: list[Sample], asked: list[Pairs]) -> dict[str, PriorRequest]:
    """Return the request of each sample's prior; with several teachers, it has one part for each."""
    named = [{sample.id: request for sample, request in pairs} for pairs in asked]
    if len(named) == 1:
        return named[0]
    wanted = {}
    for sample in samples:
        parts = tuple(part.get(sample.id) for part in named)
        first = next((part for part in parts if part is not None), None)
        if first is not None:
            wanted[sample.id] = PriorRequest(first.video, first.text, parts=parts)
    return wanted


def _ready(prior: PriorArguments, texts: list[str], device: torch.device) -> Teacher | Source:
    """Load a teacher. With a text cache, fill the cache and free the text encoder."""
    cache = prior.texts(device)
    if cache is None:
        return prior.load(device)
    state = PartialState()
    # Divide the texts first: a process that looks later finds what another has written meanwhile.
    mine = [*texts, ""][state.process_index :: state.num_processes]
    missing = [text for text in mine if cache.read(text) is None]
    teacher = prior.load(device, text_encoder=bool(missing))
    assert isinstance(teacher, Teacher)
    teacher.drop_encoder(missing)
    state.wait_for_everyone()
    return teacher
