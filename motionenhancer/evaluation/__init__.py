"""Scoring motion benchmarks as their authors do: questions, answers, judgement, intervals, comparison."""

from .benchmarks import BENCHMARKS, Benchmark, load_questions
from .compare import Comparison, compare_runs
from .judge import first_letter, lone_letter, names_option
from .scores import Judged, judge_answers, score

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Comparison",
    "Judged",
    "compare_runs",
    "first_letter",
    "judge_answers",
    "load_questions",
    "lone_letter",
    "names_option",
    "score",
]
