"""A run killed at any step ends like an undisturbed run; non-finite values keep the last good weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import World
from train_support import Died, dying, flags, report_of, shared_priors, weights_of

from motionenhancer import train
from motionenhancer.alignment.aligner import load_aligner
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students import load_student

OPTIONS = {
    "max_steps": 5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "lr_scheduler_type": "cosine",
    "alignment_schedule": "linear",
    "alignment_weight": 10.0,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
}


def run_flags(world: World, out: Path, **options: object) -> list[str]:
    aligner = out.parent / f"{out.name}.safetensors"
    return flags(world, out, prior_dir=shared_priors(world), save_aligner=aligner, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train.main(run_flags(world, out)) == 0
    return out


def checkpoints(out: Path) -> set[str]:
    return {folder.name for folder in out.glob("checkpoint-*")}


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_killed_after_any_step(world: World, whole: Path, tmp_path: Path, step: int) -> None:
    """Nothing is saved after step 1, step 2 is being saved, step 3 is not saved, step 5 is the last."""
    out = tmp_path / "out"
    with dying(step), pytest.raises(Died):
        train.main(run_flags(world, out))
    assert checkpoints(out) == ({"checkpoint-2"} if step == 3 else {"checkpoint-4"} if step == 5 else set())
    assert train.main(run_flags(world, out)) == 0
    assert checkpoints(out) == checkpoints(whole) == {"checkpoint-5"}
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(out)[name], value), name
    aligners = [load_aligner(folder.parent / "out.safetensors").state_dict() for folder in (whole, out)]
    assert all(torch.equal(aligners[0][name], aligners[1][name]) for name in aligners[0])
    logs = [[e["lambda"] for e in report_of(f)["training"]["log"] if "lambda" in e] for f in (whole, out)]
    assert logs[0] == logs[1] == pytest.approx([10.0, 8.0, 6.0, 4.0, 2.0])
    if step == 3:
        assert report_of(out)["resumed_from"] == "checkpoint-2"
        assert "resumed_from" not in report_of(whole)
        # Typed once more, the command has no step left to take: the Trainer would take one.
        assert train.main(run_flags(world, out)) == 0
        assert checkpoints(out) == {"checkpoint-5"}
        assert all(torch.equal(weights_of(out)[name], value) for name, value in weights_of(whole).items())


def test_a_checkpoint_without_one_of_its_weights_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with dying(3), pytest.raises(Died):
        train.main(run_flags(world, out))
    file = out / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file, metadata={"format": "pt"})
    assert train.main(run_flags(world, out)) == 2
    assert "checkpoint-2: 1 weight is missing (" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["loss", "gradient", "aligner"])
def test_bad_numbers_keep_the_last_good_checkpoint(
    world: World, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    original = MotionTrainer.training_step

    def spoiled(self: MotionTrainer, model: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        late = self.state.global_step == 3
        if late and where == "loss":
            model.lm_head.weight.data[0, 0] = float("inf")
        loss = original(self, model, *args, **kwargs)
        if late and where == "gradient":
            model.lm_head.weight.grad[0, 0] = float("nan")
        if late and where == "aligner":
            next(self.aligner.parameters()).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(MotionTrainer, "training_step", spoiled)
    out = tmp_path / "out"
    assert train.main(run_flags(world, out, save_steps=1)) == 2
    said = capsys.readouterr().err
    assert "at step 3" in said
    assert "train-0000" in said
    problems = {"gradient": "the gradient's norm is nan", "loss": "the model's loss is"}
    assert problems.get(where, "the norm of the aligner's gradient is inf") in said
    assert report_of(out)["status"] == "failed"
    assert checkpoints(out) == {"checkpoint-3"}
    kept = weights_of(out / "checkpoint-3")
    assert all(torch.isfinite(value).all() for value in kept.values())
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize("step", [4, 5])
def test_weights_that_a_step_spoiled_are_never_saved(
    world: World, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Only the code that saves the weights checks them after the last step."""
    original = MotionTrainer.step_aligner

    def spoiled(self: MotionTrainer) -> None:
        original(self)
        if self.state.global_step == step - 1:
            self.model.lm_head.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(MotionTrainer, "step_aligner", spoiled)
    out = tmp_path / "out"
    assert train.main(run_flags(world, out, save_strategy="no" if step == 5 else "steps")) == 2
    assert f"weight lm_head.weight is NaN or infinite after step {step}" in capsys.readouterr().err
    assert report_of(out)["status"] == "failed"
    assert checkpoints(out) == (set() if step == 5 else {"checkpoint-2"})
    assert not list(out.glob("*.safetensors"))


def test_the_checkpoint_holds_nothing_but_the_familys_files(
    whole: Path, world: World, tmp_path: Path
) -> None:
    """The checkpoint has exactly the files of save_pretrained, for transformers, vLLM and lmms-eval."""
    model, processor, _ = load_student(world.student)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain = {file.name for file in tmp_path.iterdir()}
    ours = {file.name for file in whole.iterdir() if file.is_file()}
    assert ours - {"README.md", "motion_report.json", "report.html"} == plain
    assert set(weights_of(whole)) == set(weights_of(tmp_path))
    for name in ("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
        assert (whole / name).read_text() == (tmp_path / name).read_text(), name
    # A loader that is pointed at a checkpoint to resume from reads every *.safetensors in it.
    saved = whole / "checkpoint-5"
    assert [file.name for file in saved.glob("*.safetensors")] == ["model.safetensors"]
    assert plain <= {file.name for file in saved.iterdir()}
