"""What a run leaves behind: judged answers, scores, a submission, and the text on the screen."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.question import Question
from ..data.skips import SkipLog
from ..files import write_json, write_text
from .benchmarks import READINGS, Benchmark, Rules
from .compare import Comparison
from .scores import judge_answers, score, task_order

SCORES = "scores.json"
#: Model → its means on MotionBench, and on FAVOR-Bench.
_MOTION_ROWS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "Qwen2.5-VL-3B": ((53.56, 49.45), (37.43, 38.07)),
    "Qwen2.5-VL-3B + MotionEnhancer": ((56.60, 52.51), (44.53, 43.94)),
    "Qwen2.5-VL-7B": ((52.81, 48.29), (42.61, 42.58)),
    "Qwen2.5-VL-7B + MotionEnhancer": ((57.04, 52.92), (46.88, 47.01)),
    "InternVL3-2B": ((53.96, 49.69), (39.27, 39.11)),
    "InternVL3-2B + MotionEnhancer": ((55.50, 51.35), (43.71, 45.35)),
    "InternVL3-8B": ((54.88, 50.81), (45.82, 46.35)),
    "InternVL3-8B + MotionEnhancer": ((57.69, 53.22), (48.94, 49.25)),
    "SFT on 133k samples": ((55.70, 51.25), (47.12, 47.28)),
    "7B, no head and no token selection": ((54.83, 51.51), (44.83, 44.54)),
    "7B, head selection only": ((56.60, 52.51), (46.65, 46.55)),
    "7B, token selection only": ((55.80, 51.31), (45.47, 45.99)),
    "7B, 2 DDIM steps": ((52.76,), (24.01,)),
    "7B, 10 DDIM steps": ((57.51,), (49.02,)),
    "7B, 25 % of the heads and tokens": ((55.33,), (47.12,)),
    "7B, 75 % of the heads and tokens": ((54.88,), (45.69,)),
}
PAPER_ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    "motionbench": {model: means for model, (means, _) in _MOTION_ROWS.items()},
    "favor": {model: means for model, (_, means) in _MOTION_ROWS.items()},
    "videomme": {"base model": (60.7,), "base model + MotionEnhancer": (61.4,)},
}
"""The paper's Overall and, if it prints one, Average (arXiv 2606.06853 and its supplement)."""


def write_scores(
    folder: Path,
    name: str,
    benchmark: Benchmark,
    rules: Rules,
    questions: Sequence[Question],
    outputs: dict[str, str],
    skips: SkipLog,
    verdicts: Mapping[str, bool],
    **bootstrap: Any,
) -> dict[str, Any]:
    """Judge and score, and return the content of scores.json.

    It writes results.jsonl, scores.json and the submission into ``folder``, and prints the table.

    Args:
        name: of the model or the file of answers, for the table.
        outputs: question id to output.
        verdicts: id to a judge model's verdict, which counts instead of the rule's.
        bootstrap: samples, unit and seed of :func:`score`.
    """
    judged = judge_answers(benchmark, questions, outputs, rules, verdicts)
    scores = {
        **score(judged, benchmark.tasks, **bootstrap),
        "answered": sum(q.id in outputs for q in questions),
        "skipped": skips.total,
        "skipped_by_reason": dict(skips.counts),
        "benchmark": benchmark.name,
        "rules": asdict(rules),
        "other_rules": _other_rules(benchmark, questions, outputs, rules, verdicts),
        "judged_by_model": len(verdicts),
    }
    write_text(folder / "results.jsonl", "".join(json.dumps(asdict(j)) + "\n" for j in judged))
    submission, content = benchmark.submission(questions, outputs, rules)
    write_text(folder / submission, content)
    write_json(folder / SCORES, scores)
    print(score_table(benchmark.title, name, scores, benchmark.tasks, benchmark.name))
    if scores["unanswered"]:
        print(f"{scores['unanswered']} questions have no answer and count as wrong")
    if not judged:
        print("no question could be scored", file=sys.stderr)
    if skips.total or skips.notes:
        print(skips.summary() + "".join(f"; {n} × {what}" for what, n in skips.notes.items()))
    print(f"scores.json, results.jsonl and {submission} in {folder}")
    return scores


def _other_rules(
    benchmark: Benchmark,
    questions: Sequence[Question],
    outputs: dict[str, str],
    rules: Rules,
    verdicts: Mapping[str, bool],
) -> dict[str, Any] | None:
    """Overall under the benchmark's other reading, and how many answers the two judge differently."""
    if not benchmark.rule:
        return None
    (reading,) = set(READINGS[benchmark.rule]) - {getattr(rules, benchmark.rule)}
    other = replace(rules, **{benchmark.rule: reading})
    mine, theirs = (judge_answers(benchmark, questions, outputs, r, verdicts) for r in (rules, other))
    return {
        "rules": asdict(other),
        "overall": score(theirs, samples=0)["overall"],
        "judged_differently": sum(a.right != b.right for a, b in zip(mine, theirs, strict=True)),
    }


def score_table(title: str, name: str, scores: dict[str, Any], tasks: Sequence[str], benchmark: str) -> str:
    """One row for this run with its intervals below it, then the paper's rows for the same benchmark."""
    codes = task_order(tasks, list(scores["tasks"]))
    values = [*(scores["tasks"][code]["accuracy"] for code in codes), scores["overall"], scores["average"]]
    rows = [[title, *codes, "Overall", "Average"], [name, *map(_number, values)]]
    if "intervals" in scores:
        spread = scores["intervals"]
        bounds = [*(spread["tasks"][code] for code in codes), spread["overall"], spread["average"]]
        rows.append(["  95 % interval", *(f"{low:.1f}-{high:.1f}" for low, high in bounds)])
    counts = [str(scores["tasks"][code]["count"]) for code in codes]
    rows.append(["  questions", *counts, str(scores["count"]), ""])
    none = [""] * len(codes)
    if benchmark in PAPER_ROWS:
        rows.append(["in the paper:", *none, "", ""])
    for model, means in PAPER_ROWS.get(benchmark, {}).items():
        rows.append([f"  {model}", *none, *(f"{mean:.2f}" for mean in means), *[""] * (2 - len(means))])
    return _align(rows)


def comparison_text(found: Comparison, names: tuple[str, str], task: str | None, shown: int = 10) -> str:
    """Say what :func:`compare_runs` found, with the first ``shown`` flips each way."""
    rows = [["", "A", "B", "B - A", "95 % interval"]]
    for title, part in (("Overall", found.overall), ("Average", found.average)):
        low, high = part.get("interval", (float("nan"), float("nan")))
        values = [_number(part["a"]), _number(part["b"]), f"{part['difference']:+.2f}"]
        rows.append([title, *values, f"{low:+.2f} to {high:+.2f}"])
    lines = [f"A: {names[0]}", f"B: {names[1]}"]
    lines.append(f"{found.questions} questions" + (f" of task {task}" if task else ""))
    if any(found.only):
        lines.append(f"left out: {found.only[0]} only in A, {found.only[1]} only in B")
    flips = f"{len(found.gained)} gained, {len(found.lost)} lost, p = {found.p_value:.4g}"
    lines += ["", _align(rows), "", f"McNemar, exact: {flips}"]
    for title, flipped in (("only B is right", found.gained), ("only A is right", found.lost)):
        first = f", the first {shown}" if len(flipped) > shown else ""
        lines.append(f"{title}: {len(flipped)}{first}")
        lines += [f"  {j.id} ({', '.join(j.tasks)})" for j in flipped[:shown]]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _align(rows: list[list[str]]) -> str:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([name.ljust(first), *right]).rstrip())
    return "\n".join(lines)
