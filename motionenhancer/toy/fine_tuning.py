"""One fine-tuning of the toy study, from the clips' files to the accuracy on the test questions."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging as transformers_logging

from motionenhancer.aligner import build_aligner
from motionenhancer.data import Sample, SkipLog, content_digest, prompt_text, read_frames, read_samples
from motionenhancer.data.video import Video
from motionenhancer.dataset import Item, MotionCollator, find_words
from motionenhancer.evaluation.generate import encode_request, generate_answers, greedy
from motionenhancer.prior import MotionPrior, PriorSettings, read_attention, select_prior
from motionenhancer.store import PriorStore, prior_key
from motionenhancer.toy.arms import Arm, Regime
from motionenhancer.toy.masks import mask_prior
from motionenhancer.toy.scene import TASKS
from motionenhancer.toy.world import ToyFolder, draw_clip
from motionenhancer.trainer import MotionTrainer
from motionenhancer.training.arguments import TrainArguments
from motionenhancer.vdm import load_teacher
from motionenhancer.vlm import load_student
from motionenhancer.vlm.base import Encoded

__all__ = ["accuracy", "fine_tune", "make_priors", "models", "shown_clip"]

FRAMES = 12
"""Frames of a clip that the student sees, evenly."""
_SELECTIONS = tuple((h, t) for h in ("off", "mhs") for t in ("off", "mtti"))


class Items(Dataset[Item]):
    """Samples decoded and tokenised once; pixels are kept in half precision."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return replace(self.items[index], encoded=_widened(self.items[index].encoded))


def _narrowed(encoded: Encoded) -> Encoded:
    inputs = {
        n: v.half() if v.dtype == torch.float32 and v.dim() > 1 else v
        for n, v in encoded.vision_inputs.items()
    }
    return replace(encoded, vision_inputs=inputs)


def _widened(encoded: Encoded) -> Encoded:
    inputs = {n: v.float() if v.dtype == torch.float16 else v for n, v in encoded.vision_inputs.items()}
    return replace(encoded, vision_inputs=inputs)


def shown_clip(path: Path, shown: str, index: int) -> Video:
    """What a student is shown of a clip: "video", its frames "shuffled", or its "middle" frame repeated."""
    video = read_frames(path, num_frames=FRAMES)
    if shown == "shuffled":
        return replace(video, frames=video.frames[np.random.default_rng([404, index]).permutation(FRAMES)])
    if shown == "middle":
        whole = read_frames(path).frames
        return replace(video, frames=whole[[len(whole) // 2] * FRAMES])
    return video


def models(teacher: Path, student: Path) -> dict[str, str]:
    """Which models a result is of: the teacher's id and a digest of the student's weights."""
    return {"teacher": teacher_name(teacher), "student": content_digest(student / "model.safetensors")}


def _samples(path: Path, videos: Path) -> list[Sample]:
    skips = SkipLog()
    samples = list(read_samples(path, videos, skips))
    if skips.total:
        raise ValueError(f"{path}: {skips.summary()}")
    return samples


@functools.lru_cache(maxsize=1)
def _encoded(world: Path, student: Path, shown: str) -> list[tuple[Sample, Encoded]]:
    """The training samples as the student reads them; kept for the next run of this process."""
    _, processor, family = load_student(student, dtype=torch.float32)
    folder, made = ToyFolder(world), []
    for i, sample in enumerate(_samples(folder.train, folder.videos)):
        video = shown_clip(sample.videos[0], shown, i)
        made.append((sample, _narrowed(family.encode(processor, sample, [video]))))
    return made


def accuracy(model: Any, processor: Any, family: Any, world: Path, *, shown: str = "video") -> dict[str, Any]:
    """Percent of the test questions answered word for word: overall, the mean over tasks, and by task."""
    folder = ToyFolder(world)
    settings = greedy(model, 16, processor.tokenizer.pad_token_id)
    samples = _samples(folder.test, folder.videos)
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for start in range(0, len(samples), 100):
        part = samples[start : start + 100]
        asked = [s.messages[0]["content"][-1]["text"] for s in part]
        videos = [shown_clip(s.videos[0], shown, start + i) for i, s in enumerate(part)]
        requests = [
            encode_request(family, processor, s.id, text, video)
            for s, text, video in zip(part, asked, videos, strict=True)
        ]
        answers = generate_answers(model, processor, family, requests, settings)
        for sample, answer in zip(part, answers, strict=True):
            right[sample.id.rsplit("-", 1)[1]].append(
                answer.strip() == sample.messages[1]["content"][0]["text"]
            )
    tasks = {task: 100 * float(np.mean(found)) for task, found in right.items()}
    return {
        "overall": 100 * float(np.mean([r for found in right.values() for r in found])),
        "average": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
    }


def _priors(
    arm: Arm, regime: Regime, folder: Path, teacher: Path, samples: Sequence[Sample]
) -> list[MotionPrior | None]:
    if arm.prior == "none":
        return [None] * len(samples)
    if arm.prior == "masks":
        found: list[MotionPrior | None] = []
        for i, sample in enumerate(samples):
            scene, clip = draw_clip(regime.world_seed, "train", i)
            camera = scene.camera != "still"
            found.append(None if camera else mask_prior(prompt_text(sample)[0], clip.masks[0], (5, 4, 4)))
        return found
    store, name, settings = PriorStore(folder / "priors"), teacher_name(teacher), arm.settings()
    return [store.read(_key(sample, name, settings)) for sample in samples]


def make_priors(settings: PriorSettings, folder: Path, teacher: Path) -> None:
    """Read every training clip of a study's folder once and store its prior under every selection."""
    torch.set_num_threads(1)
    world, store, name = ToyFolder(folder / "world"), PriorStore(folder / "priors"), teacher_name(teacher)
    loaded = load_teacher(teacher, dtype=torch.float32)
    ways = [replace(settings, head_selection=heads, token_selection=words) for heads, words in _SELECTIONS]
    for sample in _samples(world.train, world.videos):
        keys = [_key(sample, name, way) for way in ways]
        if not all(key in store for key in keys):
            frames = read_frames(sample.videos[0], num_frames=loaded.max_frames).frames
            reading = read_attention(loaded, frames, prompt_text(sample)[0], settings)
            for key, way in zip(keys, ways, strict=True):
                store.write(key, select_prior(reading, way))


def _key(sample: Sample, teacher: str, settings: PriorSettings) -> str:
    return prior_key(content_digest(sample.videos[0]), prompt_text(sample)[0], teacher, settings)


@functools.lru_cache(maxsize=4)
def teacher_name(folder: Path) -> str:
    from motionenhancer.vdm.identity import teacher_id

    return teacher_id(folder, dtype=torch.float32)


def fine_tune(
    arm: Arm, regime: Regime, seed: int, folder: Path, teacher: Path, student: Path
) -> dict[str, Any]:
    """Fine-tune the student as ``arm`` says and test it.

    Returns
    -------
    ``accuracy`` (see :func:`accuracy`), the last logged ``losses``, words mapped.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    world = folder / "world"
    encoded = _encoded(world, student, arm.shown)
    samples = [sample for sample, _ in encoded]
    items = []
    for (sample, tokens), prior in zip(encoded, _priors(arm, regime, folder, teacher, samples), strict=True):
        words = None if prior is None else find_words(sample, prior, tokens.layout, "both")
        items.append(Item(sample.id, tokens, prior, words, {}))
    model, processor, family = load_student(student, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        training = TrainArguments(
            output_dir=scratch,
            max_steps=regime.steps,
            per_device_train_batch_size=regime.batch,
            learning_rate=regime.learning_rate,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            save_strategy="no",
            logging_steps=50,
        )
        grid = next((item.prior.grid for item in items if item.prior is not None), None)
        trainer = MotionTrainer(
            model=model,
            args=training,
            train_dataset=Items(items),
            data_collator=MotionCollator(family, processor),
            processing_class=processor,
            alignment_weight=arm.weight,
            alignment_loss=arm.loss,
            aligner=None if grid is None else build_aligner(arm.aligner, grid, seed=seed),
        )
        trainer.train()
    model.eval()
    keep = ("loss_ar", "loss_align", "step")
    log = [
        {k: entry[k] for k in keep if k in entry} for entry in trainer.state.log_history if "loss_ar" in entry
    ]
    return {
        "accuracy": accuracy(model, processor, family, world, shown=arm.shown),
        "log": log,
        "words": trainer.counts,
    }
