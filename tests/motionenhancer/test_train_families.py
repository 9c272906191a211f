"""Training the other families of students: their frames, their loss under accumulation, their checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import SAVE
from tiny_world import World
from train_support import Weights, arguments, flags, parts, report_of, shared_priors, weights_of

from motionenhancer import train
from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students import load_student


def world_with(world: World, student: Path) -> World:
    return World(world.data, world.videos, world.teacher, student)


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Each run collects garbage several times; what exists before the test is not looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


#: Frames of the grid of a clip that is shown with 4 frames, where a token covers two of them.
PAIRS = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v")
#: Families whose language model has two more layers, which do not attend to all tokens.
HALF_READ = ("qwen3_5", "qwen3_5_moe", "gemma4", "minicpmv4_6", "minicpmv4_7")


@pytest.mark.parametrize("name", list(SAVE))
def test_a_command_trains_a_folder_and_resumes(
    world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two aligned steps, and the second one again from the checkpoint of the first."""
    student = SAVE[name](tmp_path / "student")
    seen: list[MotionDataset] = []
    original = MotionDataset.__init__

    def remembered(self: MotionDataset, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(MotionDataset, "__init__", remembered)
    options = {"prior_dir": shared_priors(world), "limit": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"video_fps": 4} if name == "qwen3_5_moe" else {"video_fps": None}
    options |= {"num_frames": 4} if name not in ("internvl", "qwen3_5_moe") else {}
    options |= {"alignment_reduce": "none"} if name == "smolvlm" else {}
    out, kept = tmp_path / "out", []
    for resumed in (None, out / "checkpoint-1"):
        options |= {"resume_from_checkpoint": resumed}
        assert train.main(flags(world_with(world, student), out, **options)) == 0
        report, taken = report_of(out), 2 if resumed is None else 1
        assert report["status"] == "finished"
        assert report["skipped"]["total"] == 0
        assert report["alignment"]["aligned_samples"] == 2 * taken
        assert report["alignment"]["mapped_words"] == report["alignment"]["words"] > 0
        read = "2 of 4 layers" if name in HALF_READ else "2 of 2 layers"
        assert report["plan"]["attention"].startswith(f"attention is read in {read}")
        assert sum(entry.get("loss_align", 0) > 0 for entry in report["training"]["log"]) == 2
        kept.append(weights_of(out))
    frames = {"internvl": 8, **dict.fromkeys(PAIRS, 2)}.get(name, 4)
    assert seen[0][0].encoded.layout.videos[0].grid[0] == frames
    before, after, again = weights_of(student), *kept
    assert set(before) == set(after)
    trained = [key for key in before if "image_tower" not in key]  # The tower of Video-LLaVA for images.
    assert sum(not torch.equal(before[key], after[key]) for key in trained) > len(trained) // 2
    first = weights_of(out / "checkpoint-1")
    assert any(not torch.equal(first[key], after[key]) for key in before)
    for key, value in after.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-7, msg=key)
    _, _, family = load_student(out)
    assert name in family.model_types


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
