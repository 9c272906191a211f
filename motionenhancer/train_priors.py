"""The priors of a training run: which samples have one, and making those that are missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from .arguments import PriorArguments
from .data import Sample, SkipLog
from .extract import make_priors, plan_priors, share_requests
from .prior import PriorSettings
from .report import RunReport
from .store import PriorStore
from .toy.world import ToyFolder
from .train_arguments import StudentArguments


@dataclass(frozen=True)
class RunPriors:
    """What a run knows of its priors.

    Attributes:
        samples: those that can be trained on, with a prior or without.
        keys: sample id → key of its prior in the store.
        grids: (F, H, W) of all priors met.
    """

    samples: list[Sample]
    keys: dict[str, str]
    grids: set[tuple[int, int, int]]


def collect_priors(
    samples: list[Sample],
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    toy: ToyFolder | None,
) -> RunPriors:
    """Priors in the store for all samples that can have one; every process makes its share of the missing.

    Args:
        samples: of the data file.
        student: `prior_source` and `alignment_weight` are read.
        prior, settings: which teacher, how, and where priors are kept.
        skips: receives samples without a prior and why.
        report: receives the teacher and every prior's description.
        toy: the toy world, where any of it is used.

    Raises:
        ValueError: priors are missing under `--prior_source store`, or nothing is left to train on or align.
    """
    state = PartialState()
    assert prior.teacher is not None
    store, name = PriorStore(Path(prior.prior_dir)), prior.teacher_id(state.device)
    requests = plan_priors(samples, name, settings, prior.prompt_source, skips)
    missing = sum(request.key not in store for request in requests)
    untrained = toy is not None and Path(prior.teacher) == toy.teacher
    if state.is_main_process:
        print(f"teacher {prior.teacher}: {len(requests) - missing} priors stored, {missing} to make")
        if untrained:
            print(
                "the toy teacher is untrained (random weights): its priors exercise the path "
                "and carry no meaning"
            )
    if student.prior_source == "store" and missing:
        raise ValueError(
            f"--prior_source store: {missing} of {len(requests)} priors are missing in {prior.prior_dir}; "
            "make them with "
            f"python -m motionenhancer.extract --teacher {prior.teacher} ..., or use --prior_source hybrid"
        )
    made = make_priors(
        share_requests(requests, state.num_processes)[state.process_index],
        store,
        settings,
        lambda: prior.load(state.device),
        skips,
        measure_roundtrip=prior.measure_roundtrip,
    )
    everyone = gather_object([made])
    keys = {k: v for part in everyone for k, v in part.keys.items()}
    unusable = {s for part in everyone for s in part.unusable}
    report.content["teacher"] = {
        "path": prior.teacher,
        "id": name,
        "trained": False if untrained else None,
        "roundtrip": next((part.roundtrip for part in everyone if part.roundtrip), None),
    }
    report.content["samples"] = [entry for part in everyone for entry in part.described]
    grids = {tuple(entry["grid"]) for part in everyone for entry in part.described}
    usable = [s for s in samples if s.id not in unusable]
    if not usable:
        raise ValueError(f"no sample is left to train on. {skips.summary()}")
    if not keys and student.alignment_weight != 0:
        raise ValueError(
            f"none of the {len(samples)} samples has a prior, so nothing would be aligned; "
            f"use --alignment_weight 0 for plain fine-tuning. {skips.summary()}"
        )
    return RunPriors(usable, keys, grids)
