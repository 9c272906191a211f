"""Scoring motion benchmarks as their authors do: questions, answers, judgement, intervals, comparison."""
