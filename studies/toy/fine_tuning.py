"""One fine-tuning of the toy study, from the clips' files to the accuracy on the test questions."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.alignment.weight import AlignmentSchedule
from motionenhancer.data import Sample, content_digest, prompt_text, read_frames
from motionenhancer.priors.prior import MotionPrior, read_attention, select_prior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.storage import PriorStore, prior_key
from motionenhancer.students import load_student
from motionenhancer.students.layout import Encoded
from motionenhancer.students.words import find_words
from motionenhancer.teachers import Teacher, load_teacher
from motionenhancer.toy.accuracy import accuracy, samples_of, shown_clip
from motionenhancer.toy.world import ToyFolder, draw_clip
from motionenhancer.training.arguments import TrainArguments
from studies.toy.arms import Arm, Regime
from studies.toy.controls import CONTROLS, own_priors
from studies.toy.masks import mask_prior
from studies.toy.train_student import Items, narrowed, widened

__all__ = ["fine_tune", "make_priors", "models"]

#: Settings that select from a finished reading, with the values that select nothing.
UNSELECTED: dict[str, Any] = {
    "head_selection": "off",
    "token_selection": "off",
    "head_ratio": 1.0,
    "token_ratio": 1.0,
}


def models(arm: Arm, teacher: Path, student: Path) -> dict[str, str]:
    """The models of a result: the student's digest and, if the arm has a teacher, the teacher's id."""
    found = {"student": content_digest(student / "model.safetensors")}
    return {"teacher": teacher_name(teacher), **found} if arm.prior in ("teacher", "student") else found


@functools.lru_cache(maxsize=1)
def _encoded(world: Path, student: Path, shown: str) -> list[tuple[Sample, Encoded]]:
    """The encoded training samples of the student, cached for the next run of this process."""
    _, processor, family = load_student(student, dtype=torch.float32)
    made = []
    for i, sample in enumerate(_training_samples(world)):
        video = shown_clip(sample.videos[0], shown, i)
        made.append((sample, narrowed(family.encode(processor, sample, [video]))))
    return made


def _priors(
    arm: Arm, regime: Regime, seed: int, folder: Path, teacher: Path, samples: Sequence[Sample]
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
    priors = [store.read(_key(sample, name, settings)) for sample in samples]
    if not arm.control:
        return list(priors)
    maps = CONTROLS[arm.control](priors, torch.Generator().manual_seed(seed))
    return [replace(prior, attention=rows) for prior, rows in zip(priors, maps, strict=True)]


def make_priors(wanted: Sequence[PriorSettings], folder: Path, teacher: Path, clips: range) -> int:
    """Store the priors of some training clips for each of the settings; returns the number of clips.

    A clip is encoded once, and read once for all settings that differ only in the selection.
    """
    torch.set_num_threads(1)
    store, name, loaded = PriorStore(folder / "priors"), teacher_name(teacher), _loaded(teacher)
    ways: dict[PriorSettings, list[PriorSettings]] = {}
    for settings in wanted:
        ways.setdefault(replace(settings, **UNSELECTED), []).append(settings)
    samples = _training_samples(folder / "world")[clips.start : clips.stop]
    for sample in samples:
        text, video = prompt_text(sample)[0], None
        for way, selections in ways.items():
            missing = [s for s in selections if _key(sample, name, s) not in store]
            if missing:
                if video is None:
                    frames = read_frames(sample.videos[0], num_frames=loaded.max_frames).frames
                    video = loaded.encode_video(frames)
                reading = read_attention(loaded, video, text, way)
                for settings in missing:
                    store.write(_key(sample, name, settings), select_prior(reading, settings))
    return len(samples)


@functools.lru_cache(maxsize=1)
def _loaded(teacher: Path) -> Teacher:
    return load_teacher(teacher, dtype=torch.float32)


@functools.lru_cache(maxsize=1)
def _training_samples(world: Path) -> list[Sample]:
    folder = ToyFolder(world)
    return samples_of(folder.train, folder.videos)


def _key(sample: Sample, teacher: str, settings: PriorSettings) -> str:
    return prior_key(content_digest(sample.videos[0]), prompt_text(sample)[0], teacher, settings)


@functools.lru_cache(maxsize=4)
def teacher_name(folder: Path) -> str:
    from motionenhancer.teachers.identity import teacher_id

    return teacher_id(folder, dtype=torch.float32)


def fine_tune(
    arm: Arm, regime: Regime, seed: int, folder: Path, teacher: Path, student: Path
) -> dict[str, Any]:
    """Fine-tune the student as ``arm`` says and test it.

    Args:
        arm: how the student is aligned.
        regime: what all arms share.
        seed: of the order of the samples and of the aligner's weights.
        folder: holds ``world/`` with the training clips and test questions, ``validation/``, a world of
            another seed, and the ``priors/`` of :func:`make_priors`.
        teacher: the teacher's folder; its priors are read from ``folder``.
        student: the base student's folder, which is not changed.

    Returns:
        ``accuracy`` on the test questions and on those for ``validation`` (see :func:`accuracy`), the ``log``
        of the losses, ``words`` mapped.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    world = folder / "world"
    encoded = _encoded(world, student, arm.shown)
    samples = [sample for sample, _ in encoded]
    items = []
    for (sample, tokens), prior in zip(
        encoded, _priors(arm, regime, seed, folder, teacher, samples), strict=True
    ):
        words = None if prior is None else find_words(sample, prior, tokens.layout, "both")
        items.append(Item(sample.id, tokens, prior, words, {}))
    model, processor, family = load_student(student, dtype=torch.float32)
    if arm.prior == "student":
        wide = [replace(item, encoded=widened(item.encoded)) for item in items]
        own = own_priors(model, processor, family, wide)
        items = [replace(item, prior=prior) for item, prior in zip(items, own, strict=True)]
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
            alignment_weight=AlignmentSchedule(arm.weight, arm.schedule),
            prior_temperature=arm.temperature,
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
        "validation": accuracy(model, processor, family, folder / "validation", shown=arm.shown),
        "log": log,
        "words": trainer.counts,
    }
