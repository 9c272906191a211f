"""Ask a student the questions of a benchmark and score its answers as the benchmark's authors do.

`python -m motionenhancer.eval --student DIR --benchmark favor --data FILE --video_root DIR --output_dir DIR`
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .data.question import Question
from .data.sampling import Frames
from .data.skips import SkipLog
from .data.sources import open_source
from .data.video import content_digest
from .evaluation.answers import read_answers, read_predictions
from .evaluation.arguments import EvalArguments
from .evaluation.benchmarks import BENCHMARKS, Rules, load_questions, render_prompt
from .evaluation.compare import compare_runs, read_results
from .evaluation.generate import Asked, Engine, answer_questions, transformers_engine, unanswered
from .evaluation.judge_model import judge_doubts
from .evaluation.motionsight import looks, read_boxes
from .evaluation.subtitles import subtitles_digest
from .evaluation.videos import VideoFolder
from .evaluation.vllm_engine import check_vllm, vllm_engine
from .evaluation.write import SCORES, comparison_text, write_scores
from .files import read_json, write_json
from .flags import parse_arguments, parse_options
from .hub import model_folder
from .integrations.lmms_eval import write_task
from .interrupts import on_interrupt
from .processes import from_main, join_processes
from .report.run_report import REPORT, RunReport
from .students import load_student, student_family
from .students.load import base_folder
from .toy.defaults import default_toy, require_all
from .weights import student_digest

PROG = "python -m motionenhancer.eval"
#: Outputs, and ids of skipped questions with reason and detail.
Answers = tuple[dict[str, str], dict[str, tuple[str, str]]]
#: Names of the files that an evaluation writes, and of files that only a model's folder has.
_FOREIGN = re.compile(r"(answers.*|results|submission)\.jsonl?|scores\.json|config\.json|.*\.safetensors")
#: Flags that change answers.
_IDENTITY = ("limit", "answer_hidden", "dtype", "attn_implementation")


def evaluate(**options: Any) -> dict[str, Any]:
    """Evaluate a student, compare two runs or write a task of lmms-eval, from Python.

    Args:
        options: the command's flags, without dashes.

    Returns:
        The content of `scores.json`; for `compare`, of `comparison.json`; for `lmms_eval`, see `export`.

    Raises:
        ValueError, OSError: see `run`, `compare` and `export`; an unknown flag is named.

    >>> evaluate(student="out", benchmark="favor", data="video_perspective.json")  # doctest: +SKIP
    """
    return _do(*parse_options((EvalArguments, Rules), options, prog=PROG))


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments((EvalArguments, Rules), argv, prog=PROG)
    try:
        done = _do(*given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if done.get("answered") == 0:
        print("error: no question was answered", file=sys.stderr)
        return 1
    return 0


def _do(arguments: EvalArguments, rules: Rules) -> dict[str, Any]:
    if arguments.compare is not None:
        return compare(arguments)
    if arguments.lmms_eval is not None:
        return export(arguments, rules)
    join_processes()
    return run(arguments, rules)


def run(arguments: EvalArguments, rules: Rules) -> dict[str, Any]:
    """Get answers from a student or a file and score them; return the content of `scores.json`.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong.
    """
    report = RunReport(Path(arguments.output_dir or "runs/eval"), {})
    try:
        return _run(arguments, rules, report)
    except BaseException as error:
        report.fail(error)
        raise


def _run(arguments: EvalArguments, rules: Rules, report: RunReport) -> dict[str, Any]:
    benchmark = BENCHMARKS[arguments.benchmark]
    _use_toy_defaults(arguments)
    assert arguments.data is not None
    skips = SkipLog()
    hidden = arguments.answer_hidden or arguments.predictions is not None
    questions = load_questions(benchmark, arguments.data, skips, limit=arguments.limit, hidden=hidden)
    source = open_source(arguments.data, folder=True)
    given = {**vars(arguments), "output_dir": None, "data": source.name}
    report.content["arguments"] = given | asdict(rules)
    report.content["digests"] = {"data": source.digest()}
    if arguments.predictions is None:
        found = _ask(arguments, questions, report)
    else:
        report.content["digests"]["predictions"] = content_digest(arguments.predictions)
        found = _read(arguments, questions, report, skips)
    if not PartialState().is_main_process:
        return {}
    if found is None:
        print(f"{report.folder}: this evaluation is finished; nothing is done")
        return read_json(report.folder / SCORES)
    outputs, gone = found
    for q in questions:
        if q.id in gone and q.answer is not None:  # The other questions are already counted.
            reason, detail = gone[q.id]
            skips.add(reason, id=q.id, line=q.line, detail=detail)
    scored = [q for q in questions if q.id not in gone]
    verdicts: dict[str, bool] = {}
    if arguments.judge_url is not None and arguments.judge_model is not None:
        judge = {"url": arguments.judge_url, "model": arguments.judge_model}
        verdicts = judge_doubts(benchmark, scored, outputs, rules, report.folder, **judge)
    scores = write_scores(
        report.folder,
        Path(arguments.predictions or arguments.student or "").name,
        benchmark,
        rules,
        scored,
        outputs,
        skips,
        verdicts,
        **arguments.bootstrap(),
    )
    report.content["skipped"] = skips.to_json()
    report.write("finished")
    on_interrupt(lambda: f"the scores are in {report.folder}")
    return scores


def compare(arguments: EvalArguments) -> dict[str, Any]:
    """Compare two scored runs and print the result; with `--output_dir` also write `comparison.json`.

    Raises:
        ValueError: a run is not scored, or the runs have different questions.
    """
    assert arguments.compare is not None
    a, b = arguments.compare
    found = compare_runs(read_results(a), read_results(b), task=arguments.task, **arguments.bootstrap())
    print(comparison_text(found, (a, b), arguments.task))
    result = {"a": a, "b": b, "task": arguments.task, **found.to_json()}
    if arguments.output_dir is not None:
        write_json(Path(arguments.output_dir) / "comparison.json", result)
    return result


def export(arguments: EvalArguments, rules: Rules) -> dict[str, Any]:
    """Write the questions as a task of lmms-eval, and return its file and number of questions.

    Questions that lack a public answer or a clip are left out.

    Raises:
        ValueError: a file is wrong, there is no clip, or a question shows a segment of its clip.
    """
    assert arguments.lmms_eval is not None
    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.data is None:
        _use_toy_defaults(arguments)
    skips = SkipLog()
    questions = load_questions(benchmark, arguments.data or "", skips, limit=arguments.limit)
    root, asked = _find_clips(arguments, questions)
    for id, (reason, detail) in _missing(asked).items():
        skips.add(reason, id=id, detail=detail)
    found = [(item.question, item.prompt, item.video) for item in asked if item.video is not None]
    if not found:
        raise ValueError(f"--video_root {root} must hold the clips of the questions, none is there")
    max_new_tokens = arguments.max_new_tokens or benchmark.max_new_tokens
    task = write_task(Path(arguments.lmms_eval), benchmark, rules, found, max_new_tokens)
    print(f"{task}: {len(found)} questions; {skips.summary()}")
    print(f"run them with --include_path {task.parent} --tasks {task.stem}")
    return {"task": str(task), "questions": len(found)}


def _use_toy_defaults(arguments: EvalArguments) -> None:
    answers = {"--student": arguments.student, "--predictions": arguments.predictions}
    who = next((name for name, value in answers.items() if value is not None), "--student")
    require_all({"--data": arguments.data, who: answers[who]})
    if arguments.data is None:
        toy = default_toy()
        arguments.data, arguments.video_root = str(toy.test), str(toy.videos)
        arguments.student = str(toy.student)


def _read(
    arguments: EvalArguments, questions: list[Question], report: RunReport, skips: SkipLog
) -> Answers | None:
    """Read answers from a file; None if this run has already finished.

    A question without an answer is wrong, unless its clip is missing in `--video_root`.
    """
    assert arguments.predictions is not None
    outputs = read_predictions(arguments.predictions, skips)
    for _ in outputs.keys() - {q.id for q in questions}:
        skips.note("prediction for no question of this run")
    gone = {}
    if arguments.video_root is not None:
        open_questions = [q for q in questions if q.id not in outputs]
        gone = _missing(_find_clips(arguments, open_questions)[1])
    report.content["missing"] = sorted(gone)
    about = {"command": "eval", "answers": "predictions", "benchmark": arguments.benchmark}
    if _claim(report, about | report.content["digests"], "no answer is lost"):
        return None
    return outputs, gone


def _ask(arguments: EvalArguments, questions: list[Question], report: RunReport) -> Answers | None:
    """Answer the open questions; returns those of all processes, None if this same run has finished."""
    benchmark = BENCHMARKS[arguments.benchmark]
    student = model_folder(arguments.student or "", "--student")
    base = base_folder(student)
    config = base / "config.json"
    if not config.is_file():
        raise ValueError(f"--student must be a transformers folder with config.json or a Hub id, got {base}")
    family = student_family(read_json(config).get("model_type"))
    if arguments.engine == "vllm":
        check_vllm(student, family)
    trained = None if benchmark.num_frames is None else _trained_frames(student)
    frames = arguments.frames(family, trained)
    root, asked = _find_clips(arguments, questions)
    max_new_tokens = arguments.max_new_tokens or benchmark.max_new_tokens
    chosen = {} if arguments.engine == "transformers" else {"engine": arguments.engine}
    if arguments.subtitles is not None and asked:
        folder = Path(arguments.subtitles)
        asked = [replace(a, subtitles=folder / f"{a.question.video}.srt") for a in asked]
        chosen["subtitles"] = subtitles_digest([a.subtitles for a in asked if a.subtitles is not None])
    if arguments.visual_prompt != "none":
        boxes = {} if arguments.boxes is None else read_boxes(arguments.boxes)
        asked = looks(arguments.visual_prompt, asked, boxes, frames.max_pixels)
        chosen["visual_prompt"] = arguments.visual_prompt
        if arguments.boxes is not None:
            chosen["boxes"] = content_digest(arguments.boxes)
    finished = _claim(
        report,
        {
            "command": "eval",
            "answers": "student",
            "benchmark": arguments.benchmark,
            "data": report.content["digests"]["data"],
            "video_root": str(root.resolve()),
            "student": "+".join(map(student_digest, dict.fromkeys((student, base)))),
            "prompt": arguments.prompt or benchmark.prompt,
            "frames": asdict(frames),
            "max_new_tokens": max_new_tokens,
            "batch_size": arguments.batch,
            **chosen,
            **{name: getattr(arguments, name) for name in _IDENTITY},
        },
        f"every written answer is kept in {report.folder}",
        answered=not unanswered(asked, report.folder),
    )
    if finished:
        return None
    gone = _missing(asked)
    state = PartialState()
    if state.is_main_process:
        print(f"{benchmark.title}: {len(asked) - len(gone)} questions for {student}")
        plain = sum(item.video is not None and item.look is None for item in asked)
        if arguments.boxes is not None and plain:
            print(f"{plain} questions have no boxes; their clips are shown as they are")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def load() -> Engine:
        options: dict[str, Any] = {"max_pixels": frames.max_pixels, "max_new_tokens": max_new_tokens}
        dtype = None if arguments.dtype == "auto" else arguments.dtype
        if arguments.engine == "vllm":
            return vllm_engine(student, dtype, **options)
        attention = arguments.attn_implementation
        loaded = load_student(student, dtype=dtype, device=state.device, attn_implementation=attention)
        return transformers_engine(*loaded, **options)

    answer_questions(
        load,
        asked,
        report.folder,
        frames,
        # vLLM pads nothing.
        length=None if arguments.engine == "vllm" else partial(family.length, max_pixels=frames.max_pixels),
        batch_size=arguments.batch,
        workers=arguments.workers,
    )
    rows = read_answers(report.folder)
    unread = {id: ("unreadable", row["skipped"]) for id, row in rows.items() if "skipped" in row}
    gone = {**unread, **gone}
    return {q.id: rows[q.id]["output"] for q in questions if q.id not in gone}, gone


def _trained_frames(student: Path) -> Frames | None:
    """How clips were shown in the training that wrote this folder or its checkpoint."""
    for folder in (student, *([student.parent] if student.name.startswith("checkpoint-") else [])):
        path = folder / REPORT
        frames = read_json(path).get("frames") if path.is_file() else None
        if frames is not None:
            try:
                return Frames(**frames)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: not a training's report (frames: {error})") from error
    return None


def _find_clips(arguments: EvalArguments, questions: Sequence[Question]) -> tuple[Path, list[Asked]]:
    """The folder of clips, and the questions with their requests and the files of their clips."""
    benchmark = BENCHMARKS[arguments.benchmark]
    root = Path(arguments.video_root or open_source(arguments.data, folder=True).root)
    clips = VideoFolder(root, benchmark.folders, benchmark.renamed)
    prompt = arguments.prompt or benchmark.prompt
    return root, [Asked(q, render_prompt(prompt, q), clips.find(q.video)) for q in questions]


def _missing(asked: Sequence[Asked]) -> dict[str, tuple[str, str]]:
    return {
        item.question.id: ("missing video", f"no file for {str(item.question.video)!r}")
        for item in asked
        if item.video is None
    }


def _claim(report: RunReport, identity: dict[str, Any], kept: str, *, answered: bool = True) -> bool:
    """Create the report's folder, or continue in it; a folder of another run is refused.

    True if this run, with the same files and rules, has finished there.

    Args:
        kept: line that says what is kept if the run is interrupted.
        answered: whether all questions have an answer.
    """
    report.identity = identity
    state = PartialState()
    settled = answered and (report.folder / SCORES).is_file() and report.finished()
    if from_main(settled):
        return True

    def interrupted() -> str:
        if state.is_main_process:
            report.write("interrupted")
        return kept

    if state.is_main_process:
        if report.path.is_file():
            report.claim()
        elif held := sorted(path.name for path in report.folder.glob("*") if _FOREIGN.fullmatch(path.name)):
            raise ValueError(
                f"--output_dir {report.folder}: holds {', '.join(held[:3])}, but no report of an evaluation; "
                "give another folder"
            )
        report.write("running")
    on_interrupt(interrupted)
    state.wait_for_everyone()
    return False


if __name__ == "__main__":
    sys.exit(main())
