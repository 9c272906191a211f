"""Flags that would do nothing beside other flags: refused, so that nobody waits for what never comes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..arguments import PriorArguments
from ..online.arguments import OnlineArguments
from .arguments import StudentArguments, TrainArguments


def refuse_idle_flags(
    student: StudentArguments, prior: PriorArguments, online: OnlineArguments, training: TrainArguments
) -> None:
    """Raise at the first flag that this combination would silently leave without effect.

    Flags of the alignment are let be at λ = 0: a baseline is the same command with another λ.

    Raises:
        ValueError: names the flag, what it is and what would be right.
    """
    if online.teacher_ranks:
        _check_teacher_ranks(student, prior, online.teacher_ranks, training)
    made = "--prior_source store" if student.prior_source == "store" else "--priors_first"
    if online.priors_first or student.prior_source == "store":
        for name in ("prior_prefetch", "agreement_clips"):
            value = getattr(online, name)
            if value and value != _default(online, name):
                raise ValueError(
                    f"--{name} {value} with {made}: no prior is made while training; leave it out, or use "
                    "--prior_source online or hybrid"
                )


def _check_teacher_ranks(
    student: StudentArguments, prior: PriorArguments, ranks: int, training: TrainArguments
) -> None:
    given = f"--teacher_ranks {ranks}"
    if not student.aligned:
        raise ValueError(
            f"{given} with --alignment_weight {student.alignment_weight:g}: no prior is wanted, so these "
            "ranks would stand idle; leave it out, or add --measure_alignment true"
        )
    if prior.measure_roundtrip:
        raise ValueError(
            f"--measure_roundtrip with {given}: the training ranks have no teacher to measure; add "
            "--measure_roundtrip false (the toy's recipe switches it on) and measure with python -m "
            "motionenhancer.extract"
        )
    if training.ddp_timeout != (usual := _default(training, "ddp_timeout")):
        raise ValueError(
            f"--ddp_timeout {training.ddp_timeout} with {given}: the training ranks are joined before it is "
            f"read, with {usual} seconds; leave it out, or do without --teacher_ranks"
        )


def _default(arguments: Any, name: str) -> Any:
    return next(one.default for one in fields(arguments) if one.name == name)
