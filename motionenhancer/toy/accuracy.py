"""Accuracy of a student on the toy world's test questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from motionenhancer.data import Clip, Sample, SkipLog, read_frames, read_samples
from motionenhancer.data.sampling import Frames
from motionenhancer.data.video import Video
from motionenhancer.evaluation.benchmarks import BENCHMARKS
from motionenhancer.evaluation.generate import encode_request, generate_answers, greedy
from motionenhancer.evaluation.judge import same_text
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
    """Percentage of right answers to the test questions: overall, mean over tasks, and by task.

    Args:
        model, processor, family: from `load_student`.
        world: the toy world.
        shown: see `shown_clip`.
        frames: number of frames of a clip; the benchmark's rule then judges the answers. None: the student
            sees `FRAMES` frames, and an answer is right if every word agrees, as in the study.
    """
    folder, benchmark = ToyFolder(world), BENCHMARKS["toy"]
    longest = 16 if frames is None else benchmark.max_new_tokens
    settings = greedy(model, longest, processor.tokenizer.pad_token_id)
    samples = samples_of(folder.test, folder.videos)
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for start in range(0, len(samples), 100):
        part = samples[start : start + 100]
        asked = [s.messages[0]["content"][-1]["text"] for s in part]
        if frames is None:
            videos = [shown_clip(s.videos[0], shown, start + i) for i, s in enumerate(part)]
        else:
            videos = [frames.of(s.videos[0]) for s in part]
        pixels = None if frames is None else frames.max_pixels
        requests = [
            encode_request(family, processor, s.id, text, video, max_pixels=pixels)
            for s, text, video in zip(part, asked, videos, strict=True)
        ]
        answers = generate_answers(model, processor, family, requests, settings)
        for sample, answer in zip(part, answers, strict=True):
            wanted = sample.messages[1]["content"][0]["text"]
            found = answer.strip() == wanted if frames is None else same_text(answer, wanted)
            right[sample.id.rsplit("-", 1)[1]].append(found)
    tasks = {task: 100 * float(np.mean(found)) for task, found in right.items()}
    return {
        "overall": 100 * float(np.mean([r for found in right.values() for r in found])),
        "average": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
    }


def accuracy_table(found: dict[str, dict[str, Any]]) -> str:
    """A table of figures, one line for each of ``found``: name → result of :func:`accuracy`.

    With "gaze", from `motionenhancer.toy.gaze.attention_on_objects`, the last column is the share of
    the attention of objects' names that lies on these objects.
    """
    gaze = all("gaze" in one for one in found.values())
    names = ("Overall", *TASKS, *(["on object"] if gaze else []))
    rows = [" " * 8 + "".join(f"{name:>10s}" for name in names)]
    for name, one in found.items():
        values = [one["overall"], *(one["tasks"][task] for task in TASKS)]
        values += [one["gaze"]["share"]] if gaze else []
        rows.append(f"{name:8s}" + "".join(f"{value:9.1f}%" for value in values))
    return "\n".join(rows)
