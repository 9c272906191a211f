"""Compute accuracies, averages and bootstrap intervals from judged answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ..data.question import Question, video_stem
from .benchmarks import Benchmark, Rules


@dataclass(frozen=True)
class Judged:
    """One question with its answer, and whether the answer is right.

    output: the model's output; None if there is none, which is wrong.
    parsed: the answer read from it.
    """

    id: str
    tasks: tuple[str, ...]
    video: str
    answer: str
    output: str | None
    parsed: str
    right: bool


def judge_answers(
    benchmark: Benchmark,
    questions: Sequence[Question],
    outputs: dict[str, str],
    rules: Rules,
    verdicts: Mapping[str, bool] = MappingProxyType({}),
) -> list[Judged]:
    """Judge every question with a public answer by ``outputs[id]``. A question without output is wrong."""
    judged = []
    for q in questions:
        if q.answer is None:
            continue
        output = outputs.get(q.id)
        parsed = "" if output is None else benchmark.parse(output, rules)
        right = output is not None and verdicts.get(q.id, benchmark.right(q, output, rules))
        judged.append(Judged(q.id, q.tasks, video_stem(q.video), q.answer, output, parsed, right))
    return judged


def task_order(tasks: Sequence[str], found: Sequence[str]) -> list[str]:
    """Codes that occur in ``found``: first in the order of ``tasks``, then by name."""
    present = set(found)
    return [t for t in tasks if t in present] + sorted(present - set(tasks))


def score(
    judged: Sequence[Judged],
    tasks: Sequence[str] = (),
    *,
    samples: int = 10_000,
    seed: int = 0,
    unit: str = "question",
) -> dict[str, Any]:
    """Accuracies in percent, with 95 % bootstrap intervals.

    Overall is the share of all questions that are right, Average the mean of the tasks' accuracies
    (MotionEnhancer, arXiv 2606.06853, experiments). A question of several tasks counts once in Overall.

    Args:
        judged: from :func:`judge_answers`.
        tasks: order of the tasks.
        samples: bootstrap resamples; 0 leaves the intervals out.
        seed: of the resampling.
        unit: "question", or "video": questions of one clip are drawn together.

    Returns:
        ``overall``, ``average`` (None when nothing was judged), ``tasks``: code to accuracy, count and
        right; ``count``, ``unanswered``, and ``intervals``: overall, average and each task to [low, high].

    >>> rows = [Judged(str(i), ("AS" if i < 3 else "CM",), "v", "x", "x", "x", i in (0, 3)) for i in range(4)]
    >>> result = score(rows, samples=0)
    >>> result["overall"], round(result["average"], 2), result["tasks"]["CM"]
    (50.0, 66.67, {'accuracy': 100.0, 'count': 1, 'right': 1})
    """
    order = task_order(tasks, [t for j in judged for t in j.tasks])
    tables = tally([judged], order)
    right, count = tables.sum(0)
    overall, average, *each = accuracies(tables.sum(0, keepdims=True), 0)[0].tolist()
    result: dict[str, Any] = {
        "overall": overall if judged else None,
        "average": average if judged else None,
        "tasks": {
            code: {"accuracy": each[i], "count": int(count[i + 1]), "right": int(right[i + 1])}
            for i, code in enumerate(order)
        },
        "count": len(judged),
        "unanswered": sum(j.output is None for j in judged),
    }
    if judged and samples:
        drawn = accuracies(bootstrap(tables, judged, samples, seed, unit), 0)
        overall, average, *each = map(interval, drawn.T)
        result["intervals"] = {
            "overall": overall,
            "average": average,
            "tasks": dict(zip(order, each, strict=True)),
        }
    return result


def tally(runs: Sequence[Sequence[Judged]], order: Sequence[str]) -> np.ndarray:
    """The contribution of each question to the sums: (questions, runs + 1, 1 + tasks) int64.

    Along the second axis: right in each of the runs, then asked. Along the third: Overall, then each task.
    """
    index = {code: i + 1 for i, code in enumerate(order)}
    tables = np.zeros((len(runs[0]), len(runs) + 1, len(order) + 1), np.int64)
    for table, *judged in zip(tables, *runs, strict=True):
        for row, value in zip(table, [*(j.right for j in judged), 1], strict=True):
            row[[0, *(index[t] for t in judged[0].tasks)]] = value
    return tables


def bootstrap(tables: np.ndarray, judged: Sequence[Judged], samples: int, seed: int, unit: str) -> np.ndarray:
    """Sums over resampled units: (N, R, C) of :func:`tally` to (samples, R, C) float64.

    Equal units are drawn as one cell of a multinomial, so the cost depends on the number of different units,
    not on the number of questions.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in ("question", "video"):
        raise ValueError(f"unit must be 'question' or 'video', got {unit!r}")
    names = [j.video if unit == "video" else str(i) for i, j in enumerate(judged)]
    numbers = np.unique(names, return_inverse=True)[1]
    units = np.zeros((int(numbers.max()) + 1, *tables.shape[1:]), np.int64)
    np.add.at(units, numbers, tables)
    cells, times = np.unique(units, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(units), times / len(units), size=samples)
    return np.tensordot(drawn.astype(np.float64), cells, 1)


def accuracies(sums: np.ndarray, run: int) -> np.ndarray:
    """(B, R, C) sums to one run's Overall, Average and tasks, (B, 1 + C), in percent; NaN for none."""
    right, count = sums[:, run], sums[:, -1]
    share = np.full(right.shape, np.nan)
    np.divide(100.0 * right, count, out=share, where=count > 0)
    each = share[:, 1:]
    seen = (~np.isnan(each)).sum(1)
    average = np.where(seen > 0, np.nansum(each, 1) / np.maximum(seen, 1), np.nan)
    return np.column_stack([share[:, 0], average, each])


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of the resamples that have a value."""
    return np.nanpercentile(values, [2.5, 97.5]).tolist()
