"""One training step of a student: plain, aligned to stored priors, or aligned by whole attention maps.

The learning rate is 0: every step does all of its work on the same weights.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import assert_error_rule
from .plan import Plan
from .shapes import dtype, randn
from .student_model import (
    VIDEO_STUDENTS,
    Sequence,
    VideoStudent,
    eager_rows,
    implementation,
    sequence,
    video_student,
)
from .work import Work

PRIOR_GRID = (13, 30, 45)
SMALL_GRID = (2, 4, 4)
KEY = "0" * 64
Result = tuple[Tensor, ...]


class Trained(NamedTuple):
    """A student, its optimizer, and the prior its words are pulled to."""

    model: Any
    optimizer: torch.optim.Optimizer
    store: Any
    folder: tempfile.TemporaryDirectory


def _trained(shape: VideoStudent) -> Trained:
    from motionenhancer.priors.confidence import prior_confidence
    from motionenhancer.priors.prior import MotionPrior
    from motionenhancer.priors.prior_settings import PriorSettings
    from motionenhancer.priors.storage import PriorStore

    model = video_student(shape)
    folder = tempfile.TemporaryDirectory()
    store = PriorStore(Path(folder.name))
    attention = randn(shape.rows, math.prod(PRIOR_GRID), seed=1).softmax(-1).half().cpu()
    words = [f"w{i}" for i in range(shape.rows)]
    spans = [(3 * i, 3 * i + 2) for i in range(shape.rows)]
    kept = list(range(shape.rows))
    prior = MotionPrior(
        attention=attention,
        tokens=words,
        spans=spans,
        prompt=" ".join(words),
        grid=PRIOR_GRID,
        heads=[],
        head_scores={},
        all_tokens=words,
        all_spans=spans,
        token_scores=[1.0] * shape.rows,
        kept=kept,
        confidence=prior_confidence(attention, PRIOR_GRID),
        teacher="benchmark",
        settings=PriorSettings(),
        frames_given=49,
        frames_used=49,
    )
    store.write(KEY, prior)
    return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.0), store, folder)


def _finish(trained: Trained, loss: Tensor, *results: Tensor) -> Result:
    trained.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained.optimizer.step()
    return loss.detach(), *(result.detach() for result in results)


def _aligned(trained: Trained, picked: Any, given: Sequence) -> Tensor:
    from motionenhancer.alignment.aligner import align

    return align(picked, trained.store.read(KEY), grid=given.grid)


def _ours(trained: Trained, given: Sequence) -> Result:
    from motionenhancer.students.capture import capture_attention

    with capture_attention(trained.model, given.rows, given.columns) as captured:
        out = trained.model(**given.batch)
    return _finish(trained, out.loss + _aligned(trained, captured.attention, given), captured.attention)


def _plain(trained: Trained, given: Sequence) -> Result:
    return _finish(trained, trained.model(**given.batch).loss)


def _eager(trained: Trained, given: Sequence) -> Result:
    with implementation(trained.model, {"text_config": "eager"}):
        out = trained.model(**given.batch, output_attentions=True)
    picked = eager_rows(out, given.rows, given.columns)
    return _finish(trained, out.loss + _aligned(trained, picked, given), picked)


ROLES = {"ours": _ours, "plain step": _plain, "output_attentions=True": _eager}


def _work(shape: VideoStudent) -> Work:
    trained = _trained(shape)
    small = sequence(shape, 0, SMALL_GRID)

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        assert all(bool(part.isfinite().all()) for part in result), "a result is not finite"
        found = ROLES[role](trained, small)
        by_map = _plain if role == "plain step" else _eager
        model = copy.deepcopy(trained.model).double()
        batch = {name: v.double() if v.is_floating_point() else v for name, v in small.batch.items()}
        idle = torch.optim.SGD(model.parameters(), lr=0.0)
        from students_support import full_precision_softmax

        with full_precision_softmax():
            exact = by_map(Trained(model, idle, *trained[2:]), small._replace(batch=batch))
        plain = by_map(trained, small)
        for one, other, another in zip(found, exact, plain, strict=True):
            assert_error_rule(one, other.double(), another, rounding=dtype())

    def make(seed: int) -> tuple[Sequence]:
        return (sequence(shape, seed),)

    return Work(
        "student training step, aligned from stored priors",
        shape.case,
        make,
        {role: lambda given, call=call: call(trained, given) for role, call in ROLES.items()},
        check,
        dtype(),
        shape.words + 2 + math.prod(shape.grid),
        op="attention_rows",
    )


def plans(size: str) -> list[Plan]:
    shapes = VIDEO_STUDENTS[size]
    return [Plan(shape.case, tuple(ROLES), lambda shape=shape: _work(shape)) for shape in shapes]
