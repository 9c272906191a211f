"""Compare two runs on the same questions: difference, interval, McNemar's test, and flipped answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..weights import student_digest
from .scores import Judged, accuracies, bootstrap, interval, tally, task_order

_RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare_runs`; differences are B minus A, in points.

    questions: number of questions that both runs have, after the filter.
    only: numbers of questions that only A, and only B, has.
    overall, average: values of A, B and the difference, and the 95 % interval of the difference.
    gained, lost: questions that only B, and only A, answered right.
    p_value: McNemar's exact test of gained against lost, two-sided.
    """

    questions: int
    only: tuple[int, int]
    overall: dict[str, Any]
    average: dict[str, Any]
    gained: list[Judged]
    lost: list[Judged]
    p_value: float

    def to_json(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "only_in_a": self.only[0],
            "only_in_b": self.only[1],
            "overall": self.overall,
            "average": self.average,
            "mcnemar": {"gained": len(self.gained), "lost": len(self.lost), "p_value": self.p_value},
            "gained": [j.id for j in self.gained],
            "lost": [j.id for j in self.lost],
        }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test, whose hypothesis is that both flips are equally likely.

    >>> mcnemar(0, 0), mcnemar(1, 9)
    (1.0, 0.021484375)
    """
    n = gained + lost
    ways = tail = 1
    for i in range(min(gained, lost)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def read_results(path: str | Path) -> list[Judged]:
    """Read a run's judged answers.

    Args:
        path: the ``--output_dir`` of an evaluation, its ``results.jsonl``, or the folder of a training whose
            evaluation lies in it or beside it.

    Raises:
        ValueError: there is no evaluation, more than one, or it was not written by this package.
    """
    file = _results_file(Path(path))
    judged = []
    for number, line in enumerate(file.read_bytes().decode(errors="replace").strip().split("\n"), start=1):
        try:
            row = json.loads(line)
            one = Judged(**{**row, "tasks": tuple(row["tasks"])})
            if not all(isinstance(text, str) for text in (one.id, one.video, one.answer, *one.tasks)):
                raise TypeError("id, video, answer and tasks must be texts")
            if not isinstance(one.right, bool) or not isinstance(one.output, str | None):
                raise TypeError("right must be true or false, and output a text or null")
            judged.append(one)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"--compare {file}, line {number}: not a judged answer ({error})") from None
    return judged


def _results_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--compare {path}: no such folder; give the --output_dir of an evaluation")
        return path
    found = [path / _RESULTS] if (path / _RESULTS).is_file() else sorted(path.glob(f"*/{_RESULTS}"))
    if not found and (path / "motion_report.json").is_file():
        digest = student_digest(path)
        found = [file for file in sorted(path.parent.glob(f"*/{_RESULTS}")) if _student_of(file) == digest]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(file.parent) for file in found)
        raise ValueError(f"--compare {path}: evaluated more than once; give one of {listed}")
    raise ValueError(f"--compare {path}: not evaluated yet; run eval --student {path} first")


def _student_of(results: Path) -> str | None:
    """The digest of the student that gave these answers, without the digest of its adapters' base."""
    try:
        report = read_json(results.parent / "motion_report.json")
        return str(report["identity"]["student"]).partition("+")[0]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare_runs(
    a: Sequence[Judged],
    b: Sequence[Judged],
    *,
    task: str | None = None,
    samples: int = 10_000,
    seed: int = 0,
    unit: str = "question",
) -> Comparison:
    """Compare two runs question by question, on the questions that both have.

    Args:
        a, b: judged answers of the two runs.
        task: only questions of this task.
        samples, seed, unit: of the bootstrap, as for :func:`score`; both runs are resampled together.

    Raises:
        ValueError: there is no common question, no question of the task, or a question has two right answers.

    >>> rows = [[Judged(str(i), ("AS",), "v", "x", "x", "x", i < n) for i in range(4)] for n in (1, 3)]
    >>> found = compare_runs(*rows, samples=100)
    >>> found.overall["difference"], [j.id for j in found.gained], found.p_value
    (50.0, ['1', '2'], 0.5)
    """
    if task is not None:
        known = sorted({t for j in (*a, *b) for t in j.tasks})
        wanted = {t.lower(): t for t in known}.get(task.lower())
        if wanted is None:
            raise ValueError(f"--task must be one of {known}, got {task!r}")
        a, b = ([j for j in run if wanted in j.tasks] for run in (a, b))
    other = {j.id: j for j in b}
    pairs = [(j, other[j.id]) for j in a if j.id in other]
    if not pairs:
        raise ValueError("the two runs have no question in common")
    for one, two in pairs:
        if one.answer != two.answer:
            raise ValueError(
                f"the runs disagree on the right answer to {one.id!r}: not the same benchmark file"
            )
    first, second = [one for one, _ in pairs], [two for _, two in pairs]
    tables = tally([first, second], task_order((), [t for j in first for t in j.tasks]))
    values = [accuracies(tables.sum(0, keepdims=True), run)[0].tolist() for run in (0, 1)]
    found: list[dict[str, Any]] = [
        {"a": x, "b": y, "difference": y - x} for x, y in zip(*values, strict=True)
    ]
    if samples:
        drawn = bootstrap(tables, first, samples, seed, unit)
        differences = accuracies(drawn, 1) - accuracies(drawn, 0)
        for value, column in zip(found[:2], differences.T, strict=False):
            value["interval"] = interval(column)
    gained = [two for one, two in pairs if two.right and not one.right]
    lost = [two for one, two in pairs if one.right and not two.right]
    only = (len(a) - len(pairs), len(b) - len(pairs))
    return Comparison(len(pairs), only, found[0], found[1], gained, lost, mcnemar(len(gained), len(lost)))
