"""What a run leaves behind: judged answers, scores, a submission, and the table on the screen."""

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
from .scores import judge_answers, score
from .table import score_table

SCORES = "scores.json"


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
    """Judge and score; write results.jsonl, scores.json and the submission into ``folder``; print the table.

    Args:
        name: of the model or the file of answers, for the table.
        outputs: question id to output.
        verdicts: id to a judge model's verdict, which counts instead of the rule's.
        bootstrap: samples, unit and seed of :func:`score`.

    Returns:
        What is in scores.json.
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
