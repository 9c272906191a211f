"""From judged answers to accuracies, their averages, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from motionenhancer.data.question import Question, video_stem

from .benchmarks import Benchmark, Rules

__all__ = ["Judged", "bootstrap", "interval", "judge_answers", "score", "task_order"]


@dataclass(frozen=True)
class Judged:
    """One question with its answer and whether that is right.

    output: what the model said; None where it said nothing, which is wrong.
    parsed: the answer read from it.
    """

    id: str
    tasks: tuple[str, ...]
    video: str
    answer: str
    output: str | None
    parsed: str
    right: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": list(self.tasks)}


def judge_answers(
    benchmark: Benchmark, questions: Sequence[Question], outputs: dict[str, str], rules: Rules | None = None
) -> list[Judged]:
    """Judge every question with a public answer; one that has no output is wrong.

    Args:
        benchmark: whose rule holds.
        questions: from :func:`load_questions`.
        outputs: question id to output.
        rules: which reading of the rule; the default one if None.
    """
    rules = Rules() if rules is None else rules
    judged = []
    for q in questions:
        if q.answer is None:
            continue
        output = outputs.get(q.id)
        parsed = "" if output is None else benchmark.parse(output, rules)
        right = output is not None and benchmark.right(q, output, rules)
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
    if unit not in ("question", "video"):
        raise ValueError(f"unit must be 'question' or 'video', got {unit!r}")
    order = task_order(tasks, [t for j in judged for t in j.tasks])
    right, count = (tally(judged, order, column) for column in ("right", "count"))
    totals = np.concatenate([right.sum(0), count.sum(0)])[None]
    overall, average, each = accuracies(totals, len(order))
    result: dict[str, Any] = {
        "overall": _number(overall[0]),
        "average": _number(average[0]),
        "tasks": {
            code: {
                "accuracy": float(each[0, i]),
                "count": int(count[:, i + 1].sum()),
                "right": int(right[:, i + 1].sum()),
            }
            for i, code in enumerate(order)
        },
        "count": len(judged),
        "unanswered": sum(j.output is None for j in judged),
    }
    if judged and samples:
        units = unit_numbers(judged, unit)
        drawn = bootstrap(grouped_sums(np.hstack([right, count]), units), samples, seed)
        overall, average, each = accuracies(drawn, len(order))
        result["intervals"] = {
            "overall": interval(overall),
            "average": interval(average),
            "tasks": {code: interval(each[:, i]) for i, code in enumerate(order)},
        }
    return result


def bootstrap(units: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums over resampled units.

    Equal units are drawn as one cell of a multinomial, so that the cost depends on how many different units
    there are, not on how many questions.

    Args:
        units: (U, C) counts of each unit.
        samples: B.
        seed: of the draw.

    Returns:
        (B, C) float64.
    """
    cells, times = np.unique(units, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(units), times / len(units), size=samples)
    return drawn @ cells.astype(np.float64)


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 %, resamples without a value left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def tally(judged: Sequence[Judged], order: Sequence[str], column: str) -> np.ndarray:
    """(N, 1 + T): Overall first, then each task."""
    index = {code: i + 1 for i, code in enumerate(order)}
    table = np.zeros((len(judged), len(order) + 1), np.int64)
    for row, j in zip(table, judged, strict=True):
        value = 1 if column == "count" else int(j.right)
        row[[0, *(index[t] for t in j.tasks)]] = value
    return table


def unit_numbers(judged: Sequence[Judged], unit: str) -> np.ndarray:
    names = [j.video if unit == "video" else str(i) for i, j in enumerate(judged)]
    return np.unique(names, return_inverse=True)[1]


def grouped_sums(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    grouped = np.zeros((int(units.max()) + 1, rows.shape[1]), rows.dtype)
    np.add.at(grouped, units, rows)
    return grouped


def accuracies(sums: np.ndarray, tasks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, 2 + 2 T) sums of right and count to Overall (B,), Average (B,) and each task (B, T), in percent."""
    right, count = sums[:, : tasks + 1], sums[:, tasks + 1 :]
    share = np.full(right.shape, np.nan)
    np.divide(100.0 * right, count, out=share, where=count > 0)
    each = share[:, 1:]
    seen = np.maximum((~np.isnan(each)).sum(1), 1)
    average = np.where(np.isnan(each).all(1), np.nan, np.nansum(each, 1) / seen)
    return share[:, 0], average, each


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
