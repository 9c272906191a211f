"""Put a benchmark's questions to a student and score its answers as the benchmark's authors do.

`python -m motionenhancer.eval --student DIR --benchmark favor --data FILE --video_root DIR --output_dir DIR`
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .data.question import Question
from .data.skips import SkipLog
from .evaluation.answers import read_answers, read_predictions
from .evaluation.benchmarks import BENCHMARKS, Benchmark, Rules, load_questions, render_prompt
from .evaluation.compare import compare_runs, read_results
from .evaluation.generate import Asked, answer_questions
from .evaluation.table import comparison_text
from .evaluation.videos import Frames, VideoFolder, default_frames
from .evaluation.write import student_digest, write_scores
from .files import write_json
from .flags import parse_arguments
from .processes import join_processes
from .report.run_report import RunReport
from .settings import EvalArguments
from .students import StudentFamily, load_student, student_family
from .toy.defaults import default_toy

PROG = "python -m motionenhancer.eval"


def main(argv: Sequence[str] | None = None) -> int:
    (arguments,) = parse_arguments((EvalArguments,), argv, prog=PROG)
    try:
        if arguments.compare is not None:
            compare(arguments)
        else:
            join_processes()
            run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: EvalArguments) -> dict[str, Any]:
    """Ask, or read, and score; returns what it wrote to `scores.json`.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong.
    """
    benchmark = BENCHMARKS[arguments.benchmark]
    rules = Rules(arguments.letter_rule, arguments.option_rule)
    folder = Path(arguments.output_dir or "runs/eval")
    _use_toy_defaults(arguments)
    assert arguments.data is not None
    skips = SkipLog()
    hidden = arguments.answer_hidden or arguments.predictions is not None
    questions = load_questions(benchmark, arguments.data, skips, limit=arguments.limit, hidden=hidden)
    if arguments.predictions is not None:
        report, outputs, questions = _read(arguments, benchmark, questions, folder, skips)
    else:
        report, outputs, questions = _ask(arguments, benchmark, questions, folder, skips)
    if not PartialState().is_main_process:
        return {}
    scores = write_scores(
        folder,
        Path(arguments.predictions or arguments.student or "").name,
        benchmark,
        rules,
        questions,
        outputs,
        skips,
        samples=arguments.bootstrap_samples,
        unit=arguments.bootstrap_unit,
        seed=arguments.seed,
    )
    report.content["skipped"] = skips.to_json()
    report.content["arguments"] = asdict(arguments)
    report.write("finished")
    return scores


def compare(arguments: EvalArguments) -> dict[str, Any]:
    """Compare two scored runs and print the result; with `--output_dir` write `comparison.json` too.

    Raises:
        ValueError: a run is not scored, or the two are not of the same questions.
    """
    assert arguments.compare is not None
    a, b = arguments.compare
    found = compare_runs(
        read_results(a),
        read_results(b),
        task=arguments.task,
        samples=arguments.bootstrap_samples,
        seed=arguments.seed,
        unit=arguments.bootstrap_unit,
    )
    print(comparison_text(found, (a, b), arguments.task))
    result = {"a": a, "b": b, "task": arguments.task, **found.to_json()}
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", result)
    return result


def _use_toy_defaults(arguments: EvalArguments) -> None:
    needs_data = arguments.data is None
    if needs_data and arguments.video_root is not None:
        raise ValueError(f"--video_root {arguments.video_root} needs --data, the questions about its clips")
    if not needs_data and (arguments.student is not None or arguments.predictions is not None):
        return
    toy = default_toy()
    if needs_data:
        arguments.data, arguments.video_root = str(toy.test), str(toy.videos)
    if arguments.student is None and arguments.predictions is None:
        arguments.student = str(toy.student)


def _read(
    arguments: EvalArguments, benchmark: Benchmark, questions: list[Question], folder: Path, skips: SkipLog
) -> tuple[RunReport, dict[str, str], list[Question]]:
    """Answers made elsewhere → report, outputs, and the questions that could have been put.

    A question without an answer is wrong, unless `--video_root` shows that its clip is missing.
    """
    assert arguments.predictions is not None
    outputs = read_predictions(arguments.predictions, skips)
    known = {q.id for q in questions}
    for _ in [id for id in outputs if id not in known]:
        skips.note("prediction for no question of this run")
    gone: set[str] = set()
    if arguments.video_root is not None:
        clips = VideoFolder(arguments.video_root, benchmark.folders)
        unanswered = [Asked(q, "", clips.find(q.video)) for q in questions if q.id not in outputs]
        gone = _skip_missing(unanswered, skips)
    report = _claim(folder, {"command": "eval", "answers": "predictions"})
    return report, outputs, [q for q in questions if q.id not in gone]


def _ask(
    arguments: EvalArguments, benchmark: Benchmark, questions: list[Question], folder: Path, skips: SkipLog
) -> tuple[RunReport, dict[str, str], list[Question]]:
    """Answer what is not answered yet → report, outputs of all processes, and the questions that were put."""
    assert arguments.student is not None
    assert arguments.data is not None
    family = _family(arguments.student)
    frames = _frames(arguments, family, benchmark)
    clips = VideoFolder(arguments.video_root or Path(arguments.data).parent, benchmark.folders)
    prompt = arguments.prompt or benchmark.prompt
    max_new_tokens = arguments.max_new_tokens or benchmark.max_new_tokens
    report = _claim(
        folder,
        {
            "command": "eval",
            "answers": "student",
            "benchmark": benchmark.name,
            "data": hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest(),
            "video_root": str(clips.root.resolve()),
            "limit": arguments.limit,
            "answer_hidden": arguments.answer_hidden,
            "student": student_digest(arguments.student),
            "prompt": prompt,
            "frames": asdict(frames),
            "max_new_tokens": max_new_tokens,
            "batch_size": arguments.batch_size,
            "dtype": arguments.dtype,
            "attn_implementation": arguments.attn_implementation,
        },
    )
    asked = [Asked(q, render_prompt(prompt, q), clips.find(q.video)) for q in questions]
    gone = _skip_missing(asked, skips)
    state = PartialState()
    if state.is_main_process:
        print(f"{benchmark.title}: {len(asked) - len(gone)} questions for {arguments.student}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    answer_questions(
        lambda: load_student(
            str(arguments.student),
            dtype=None if arguments.dtype == "auto" else arguments.dtype,
            device=state.device,
            attn_implementation=arguments.attn_implementation,
        ),
        asked,
        folder,
        frames,
        max_new_tokens=max_new_tokens,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    rows = read_answers(folder)
    for question in questions:
        reason = rows.get(question.id, {}).get("skipped")
        if reason is not None and question.id not in gone:
            gone.add(question.id)
            if question.answer is not None:
                skips.add("unreadable", id=question.id, line=question.line, detail=str(reason))
    put = [q for q in questions if q.id not in gone]
    return report, {q.id: rows[q.id]["output"] for q in put}, put


def _family(student: str) -> StudentFamily:
    config = Path(student) / "config.json"
    if not config.is_file():
        raise ValueError(f"--student must be a transformers folder with a config.json, got {student}")
    return student_family(json.loads(config.read_text(encoding="utf-8")).get("model_type"))


def _frames(arguments: EvalArguments, family: StudentFamily, benchmark: Benchmark) -> Frames:
    """The family's sampling with whatever flags change of it."""
    frames = default_frames(family.num_frames, benchmark.name)
    given = {name: getattr(arguments, name) for name in ("num_frames", "min_frames", "max_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.video_fps is not None:
        if "num_frames" in given:
            raise ValueError("--num_frames and --video_fps exclude each other: give one of them")
        given |= {"num_frames": None, "fps": arguments.video_fps}
    if "max_frames" in given:
        given.setdefault("min_frames", min(frames.min_frames, given["max_frames"]))
    if arguments.max_pixels is not None:
        given["max_pixels"] = arguments.max_pixels or None
    try:
        return replace(frames, **given)
    except ValueError as error:
        # Of the frames' own names only the rate is not the flag's.
        raise ValueError(f"--{'video_' if str(error).startswith('fps') else ''}{error}") from error


def _skip_missing(asked: Sequence[Asked], skips: SkipLog) -> set[str]:
    gone = set()
    for item in asked:
        if item.video is None:
            q = item.question
            gone.add(q.id)
            if q.answer is not None:  # The others are counted already.
                skips.add("missing video", id=q.id, line=q.line, detail=f"no file for {str(q.video)!r}")
    return gone


def _claim(folder: Path, identity: dict[str, Any]) -> RunReport:
    """Make the folder this run's, or go on in it; a folder of another run is refused."""
    report = RunReport(folder, identity)
    state = PartialState()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if report.path.is_file():
            report.claim()
        elif any(folder.glob("answers*.jsonl")):
            raise ValueError(f"--output_dir {folder}: holds answers of an unknown run; give another folder")
        report.write("running")
    state.wait_for_everyone()
    return report


if __name__ == "__main__":
    sys.exit(main())
