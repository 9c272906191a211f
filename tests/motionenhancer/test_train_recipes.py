"""The recipes in configs/: the paper's numbers, read as the command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_students import save_internvl
from tiny_world import World
from train_support import shared_priors

from motionenhancer import train
from motionenhancer.alignment.weight import AlignmentSchedule
from motionenhancer.flags import parse_arguments
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.settings import DataArguments, StudentArguments
from motionenhancer.training.arguments import TrainArguments
from motionenhancer.training.run_plan import vision_rate

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = (StudentArguments, DataArguments, PriorArguments, PriorSettings, TrainArguments)


def read(name: str, tmp_path: Path) -> tuple:
    argv = ["--config", str(CONFIGS / name), "--output_dir", str(tmp_path), "--dry_run"]
    return parse_arguments(CLASSES, argv, prog="test")


@pytest.mark.parametrize("name", ["qwen2_5_vl.yaml", "internvl3.yaml"])
def test_the_papers_recipe(name: str, tmp_path: Path) -> None:
    student, _, _, settings, training = read(name, tmp_path)
    assert (training.learning_rate, vision_rate(student, training)) == (1e-5, 2e-6)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, str(training.lr_scheduler_type.value)) == (0.1, "cosine")
    assert (training.get_warmup_steps(1000), training.num_train_epochs) == (30, 1)
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    assert settings == PriorSettings()
    assert student.schedule() == AlignmentSchedule(1.0)
    assert (student.aligner, student.alignment_loss, student.lora_r) == ("mlp", "l2", 0)
    frames = (student.num_frames, student.video_fps)
    assert frames == ((None, 1) if name.startswith("qwen") else (8, None))


def test_the_defaults_are_the_papers_too(tmp_path: Path) -> None:
    """The recipe's optimizer settings are the defaults; its file adds options for the machine."""
    *_, plain = parse_arguments(CLASSES, ["--output_dir", str(tmp_path)], prog="t")
    *_, training = read("qwen2_5_vl.yaml", tmp_path)
    for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps"):
        assert getattr(plain, name) == getattr(training, name), name
    assert plain.lr_scheduler_type == training.lr_scheduler_type
    assert plain.num_train_epochs == training.num_train_epochs


def test_one_gpu_takes_the_same_batch_and_trains_adapters(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = save_internvl(tmp_path / "student")
    flags = world.flags(student=student, output_dir=tmp_path / "out", prior_dir=shared_priors(world))
    config = ["--config", str(CONFIGS / "lora_one_gpu.yaml"), "--dry_run"]
    assert train.main([*flags, *config]) == 0
    said = capsys.readouterr().out
    assert "of 8 samples" in said
    assert said.count("frozen") == 3
    assert "language model" in said
    assert "learning rate 0.0001" in said


def test_the_toys_recipe_is_the_one_built_in() -> None:
    assert yaml.safe_load((CONFIGS / "toy.yaml").read_text()) == yaml.safe_load(train.TOY_RECIPE.read_text())
