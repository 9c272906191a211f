"""Accuracy of a student on the toy world's test questions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from motionenhancer.data import Clip, Sample, SkipLog, read_frames, read_samples
from motionenhancer.data.sampling import Frames
from motionenhancer.data.video import Video
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, load_questions
from motionenhancer.evaluation.generate import Asked, encode_batch, transformers_engine
from motionenhancer.evaluation.scores import judge_answers, score
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import ToyFolder

__all__ = ["accuracy", "accuracy_table", "samples_of", "shown_clip"]

FRAMES = 8
"""Number of frames that the toy student sees of a clip; ``recipe.yaml`` has the same number."""


def shown_clip(path: Path | Clip, shown: str, index: int) -> Video:
    """The shown frames of a clip: "video" as it is, "shuffled", or the "middle" frame repeated."""
    video = read_frames(path, num_frames=FRAMES)
    if shown == "shuffled":
        return replace(video, frames=video.frames[np.random.default_rng([404, index]).permutation(FRAMES)])
    if shown == "middle":
        whole = read_frames(path).frames
        return replace(video, frames=whole[[len(whole) // 2] * FRAMES])
    return video


def samples_of(path: Path, videos: Path) -> list[Sample]:
    """Read a toy world's file of samples, which must be complete."""
    skips = SkipLog()
    samples = list(read_samples(path, videos, skips))
    if skips.total:
        raise ValueError(f"{path}: {skips.summary()}")
    return samples


def accuracy(
    model: Any,
    processor: Any,
    family: Any,
    world: Path,
    *,
    shown: str = "video",
    frames: Frames | None = None,
) -> dict[str, Any]:
    """Percentage of right answers to the test questions: overall, mean over tasks, and by task that occurs.

    Args:
        model, processor, family: from `load_student`.
        world: the toy world.
        shown: see `shown_clip`.
        frames: number of frames of a clip; the benchmark's rule then judges the answers. None: the student
            sees `FRAMES` frames, and an answer is right if every word agrees, as in the study.
    """
    folder, benchmark, skips = ToyFolder(world), BENCHMARKS["toy"], SkipLog()
    longest = benchmark.max_new_tokens
    if frames is None:
        frames, longest = Frames(num_frames=FRAMES), 16
        benchmark = replace(benchmark, right=lambda question, output, _: output.strip() == question.answer)
    questions = load_questions(benchmark, folder.test, skips)
    if skips.total:
        raise ValueError(f"{folder.test}: {skips.summary()}")
    asked = []
    for i, question in enumerate(questions):
        path = folder.videos / str(question.video)
        look = None if shown == "video" else partial(_another_look, path, shown, i)
        asked.append(Asked(question, question.text, path, look=look))
    engine = transformers_engine(
        model, processor, family, max_pixels=frames.max_pixels, max_new_tokens=longest
    )
    outputs: dict[str, str] = {}
    for start in range(0, len(asked), 100):
        rows, requests = encode_batch(asked[start : start + 100], engine.encode, frames)
        outputs |= zip([row["id"] for row in rows], engine.answer(requests), strict=True)
    found = score(judge_answers(benchmark, questions, outputs, Rules()), samples=0)
    tasks = {task: found["tasks"][task]["accuracy"] for task in TASKS if task in found["tasks"]}
    return {"overall": found["overall"], "average": found["average"], "tasks": tasks}


def _another_look(path: Path, shown: str, index: int, video: Video) -> Video:
    return shown_clip(path, shown, index)


def accuracy_table(found: dict[str, dict[str, Any]]) -> str:
    """A table of figures, one line for each of ``found``: name → result of :func:`accuracy`.

    With "gaze", from `motionenhancer.toy.gaze.attention_on_objects`, the last column is the share of
    the words' attention that lies on the objects that they speak of.
    """
    gaze = all("gaze" in one for one in found.values())
    tasks = [task for task in TASKS if all(task in one["tasks"] for one in found.values())]
    names = ("Overall", *tasks, *(["on object"] if gaze else []))
    rows = [" " * 8 + "".join(f"{name:>10s}" for name in names)]
    for name, one in found.items():
        values = [one["overall"], *(one["tasks"][task] for task in tasks)]
        values += [one["gaze"]["share"]] if gaze else []
        rows.append(f"{name:8s}" + "".join(f"{value:9.1f}%" for value in values))
    return "\n".join(rows)
