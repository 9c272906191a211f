"""Training the other families of students: their frames, their loss under accumulation, their checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import SAVE
from tiny_world import World
from train_support import Weights, arguments, flags, parts, report_of, weights_of

from motionenhancer import train
from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students import load_student


def world_with(world: World, student: Path) -> World:
    return World(world.data, world.videos, world.teacher, student)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "internvl", "llava_onevision", "gemma4"])
def test_a_run_trains_and_saves_the_family(
    world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = SAVE[name](tmp_path / "student")
    seen: list[MotionDataset] = []
    original = MotionDataset.__init__

    def remembered(self: MotionDataset, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(MotionDataset, "__init__", remembered)
    options = {"video_fps": 4 if name == "qwen3_5_moe" else None, "limit": 4}
    options |= {"num_frames": 6} if name in ("llava_onevision", "gemma4") else {}
    out = tmp_path / "out"
    assert train.main(flags(world_with(world, student), out, **options)) == 0
    report = report_of(out)
    assert report["status"] == "finished"
    assert report["skipped"]["total"] == 0
    assert report["alignment"]["mapped_words"] == report["alignment"]["words"] > 0
    assert any("loss_align" in entry for entry in report["training"]["log"])
    layers = 4 if name in ("qwen3_5_moe", "gemma4") else 2
    assert report["plan"]["attention"].startswith(f"attention is read in 2 of {layers} layers")
    frames = {"internvl": 8, "llava_onevision": 6, "gemma4": 6, "qwen3_5_moe": 2}[name]
    assert seen[0][0].encoded.layout.videos[0].grid[0] == frames
    before, after = weights_of(student), weights_of(out)
    assert set(before) == set(after)
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) // 2
    _, _, family = load_student(out)
    assert name in family.model_types


@pytest.mark.parametrize("name", list(SAVE))
def test_a_step_and_what_is_resumed(world: World, tmp_path: Path, name: str) -> None:
    """Two aligned steps, and the second one again from the checkpoint of the first."""
    kept = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-1")):
        student = SAVE[name](tmp_path / "student") if resume is None else tmp_path / "student"
        model, dataset, collator = parts(world_with(world, student), tmp_path)
        dataset.frames = replace(dataset.frames, num_frames=4)
        weights = Weights()
        trainer = MotionTrainer(
            model=model,
            args=arguments(tmp_path, save_strategy="steps", save_steps=1),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[weights],
            aligner=build_aligner("mlp", (5, 8, 8)),
            attention={"reduce": "none"} if name == "smolvlm" else {},
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.counts["aligned_samples"] == 2 * len(weights.steps)
        assert trainer.counts["mapped_words"] == trainer.counts["words"] > 0
        assert trainer.state.log_history[-2]["loss_align"] > 0
        kept.append(weights.steps)
    assert [len(steps) for steps in kept] == [2, 1]
    assert any(not torch.equal(kept[0][0][key], value) for key, value in kept[0][1].items())
    for key, value in kept[0][1].items():
        torch.testing.assert_close(kept[1][0][key], value, rtol=0, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "video_llama_3"])
def test_accumulation_gives_the_large_batch(world: World, tmp_path: Path, name: str) -> None:
    """Both losses and the weights, with unequal answers and numbers of priors in the micro-batches.

    Some families' own loss is a share of the global batch, which the Trainer does not divide again.
    """
    student = world.student if name == "qwen2_5_vl" else SAVE[name](tmp_path / "student")
    kept = {}
    for accumulation in (1, 4):
        model, dataset, collator = parts(world_with(world, student), tmp_path)
        for sample in dataset.samples[:3]:
            dataset.keys.pop(sample.id)
        weights = Weights()
        trainer = MotionTrainer(
            model=model,
            args=arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
            ),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[weights],
            aligner=build_aligner("mlp", (5, 8, 8)),
            alignment_weight=10.0,
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss_align" in entry]
        kept[accumulation] = (log, weights.steps[-1], trainer.aligner.state_dict())
    (log, whole, aligner), (split_log, split, split_aligner) = kept[1], kept[4]
    for entry, other in zip(log, split_log, strict=True):
        for term in ("loss", "loss_ar", "loss_align", "grad_norm"):
            assert other[term] == pytest.approx(entry[term], rel=2e-5), term
    start = dict(load_student(student)[0].named_parameters())
    for name, value in whole.items():
        if name in start:
            moved = float((value - start[name].detach()).norm())
            assert float((split[name] - value).norm()) <= 1e-3 * moved + 1e-6, name
    for name, value in aligner.items():
        torch.testing.assert_close(split_aligner[name], value, rtol=0, atol=1e-4, msg=name)
