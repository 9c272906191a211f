"""Changes that make a run a different run, changes that do not, and the checkpoints to continue from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_world import World
from train_support import flags
from transformers import Trainer

from motionenhancer import train
from motionenhancer.alignment.aligner_training import AlignerTraining
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.data import content_digest
from motionenhancer.flags import parse_arguments
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.settings import DataArguments, OnlineArguments, StudentArguments
from motionenhancer.training.arguments import TrainArguments, ValidationArguments
from motionenhancer.training.run_identity import (
    checkpoint_format,
    checkpoint_to_resume,
    newest_checkpoint,
    run_identity,
)

#: What every identity holds. A report that lacks one of these, or holds another, is that of another run.
ENTRIES = str.split("""
    student teacher data data_digest video_root limit prior prompt_source teacher_options num_frames video_fps
    max_frames alignment_weight alignment_schedule alignment_warmup alignment_end_weight vision_learning_rate
    alignment_layers alignment_heads alignment_reduce alignment_loss normalize_rows aligner prior_temperature
    confidence_gate measure_alignment lora_r lora_alpha lora_dropout lora_target max_pixels learning_rate
    num_train_epochs max_steps seed data_seed train_sampling_strategy dataloader_drop_last
    average_tokens_across_devices neftune_noise_alpha weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm optim optim_args optim_target_modules lr_scheduler_type lr_scheduler_kwargs warmup_steps
    bf16 fp16 even_batches use_seedable_sampler global_batch_size checkpoints
""")


def identity(world: World, out: Path, *more: str, **options: object) -> dict[str, Any]:
    classes = (
        StudentArguments,
        DataArguments,
        PriorArguments,
        PriorSettings,
        OnlineArguments,
        TrainArguments,
        ValidationArguments,
    )
    given = [*flags(world, out, **options), *more]
    student, data, prior, settings, _, training, validation = parse_arguments(classes, given, prog="train")
    return json.loads(json.dumps(run_identity(student, data, prior, settings, training, validation)))


def changed(world: World, out: Path, **options: object) -> set[str]:
    one, other = identity(world, out), identity(world, out, **options)
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_scheduler_kwargs", '{"num_cycles": 2}'),
        ("optim_args", "momentum=0.9"),
        ("optim_target_modules", "all-linear"),
        ("neftune_noise_alpha", 5.0),
        ("max_grad_norm", 0.5),
        ("average_tokens_across_devices", False),
        ("data_seed", 3),
        ("adam_beta2", 0.95),
    ],
)
def test_what_changes_the_result_makes_another_run(
    world: World, tmp_path: Path, name: str, value: object
) -> None:
    assert changed(world, tmp_path, **{name: value}) == {name}


def test_the_entries_of_an_identity(world: World, tmp_path: Path) -> None:
    """Some only where they play a part, so that reports of older runs, which lack them, are equal."""
    plain = identity(world, tmp_path)
    assert sorted(plain) == sorted(ENTRIES)
    assert plain["data_digest"] == content_digest(world.data)
    assert plain["teacher_options"]["dtype"] == "torch.float32", "of a teacher without --teacher_dtype"
    teachers = ("--teacher", str(world.teacher), "regions", "--teacher_size", "64x64")
    two = identity(world, tmp_path, *teachers, "--region_grid", "2x4x4")
    assert two.keys() - plain.keys() == {"teacher_weights"}
    assert two["teacher_weights"] == [1, 1]
    assert two["teacher_options"] == {
        **plain["teacher_options"],
        "size": "(64, 64)",
        "region_grid": "2x4x4",
    }, "the first one's, and the grid of the regions"
    by_confidence = identity(
        world, tmp_path, "--teacher", str(world.teacher), "self", "--teacher_weights", "confidence"
    )
    assert by_confidence["teacher_weights"] == ["confidence"]
    dropping = identity(world, tmp_path, dataloader_drop_last=True)
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1}
    assert {name: dropping[name] for name in dropping.keys() - plain.keys()} == size
    ordered = identity(world, tmp_path, lr_scheduler_kwargs='{"b": 2, "a": 1}')["lr_scheduler_kwargs"]
    assert ordered == '{"a": 1, "b": 2}'


def test_held_out_data_is_part_of_an_identity(world: World, tmp_path: Path) -> None:
    plain, given = identity(world, tmp_path), {"eval_data": world.data, "eval_strategy": "epoch"}
    held_out = identity(world, tmp_path, **given)
    added = {name: held_out[name] for name in held_out.keys() - plain.keys()}
    assert added == {
        "eval_data": str(world.data),
        "eval_data_digest": content_digest(world.data),
        "eval_video_root": None,
        "early_stopping_patience": None,
    }
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "loss"}
    added = {
        **best,
        "eval_strategy": "IntervalStrategy.EPOCH",
        "eval_steps": None,
        "eval_delay": 0,
    }
    del added["save_strategy"]
    kept = identity(world, tmp_path, **given, **best)
    assert {name: kept[name] for name in kept.keys() - held_out.keys()} == added


def test_samples_in_another_order_make_another_run(world: World, tmp_path: Path) -> None:
    assert changed(world, tmp_path, accelerator_config='{"use_seedable_sampler": false}') == {
        "use_seedable_sampler"
    }


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 7},
        {"save_strategy": "steps", "save_steps": 3},
        {"dataloader_num_workers": 2},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"sample_cache_mb": 5},
        {"prior_source": "online"},
    ],
    ids=str,
)
def test_what_changes_nothing_of_the_result_does_not(
    world: World, tmp_path: Path, options: dict[str, object]
) -> None:
    assert changed(world, tmp_path, **options) == set()


def test_only_the_global_batch_counts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hardware may continue a run if every step has the same samples."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert changed(world, tmp_path, **split) == set()
    alone, dropping = identity(world, tmp_path), identity(world, tmp_path, dataloader_drop_last=True)
    monkeypatch.setattr(TrainArguments, "world_size", property(lambda self: 2))
    assert identity(world, tmp_path, per_device_train_batch_size=1) == alone
    both = identity(world, tmp_path)
    assert {k for k in alone if alone[k] != both[k]} == {"global_batch_size"}
    assert (alone["global_batch_size"], both["global_batch_size"]) == (2, 4)
    # With dataloader_drop_last, the batch size of a process decides which samples are dropped.
    assert (
        identity(world, tmp_path, per_device_train_batch_size=1, dataloader_drop_last=True)["world_size"]
        != dropping["world_size"]
    )


def test_another_number_of_processes_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("before any work"))
        out.mkdir()
        (out / "motion_report.json").write_text(
            json.dumps({"status": "running", "identity": identity(world, out)})
        )
        patch.setattr(TrainArguments, "world_size", property(lambda self: 2))
        assert train.main(flags(world, out)) == 2
    assert "global_batch_size: 2 there, 4 now" in capsys.readouterr().err


def test_sharded_checkpoints_belong_to_their_engine() -> None:
    assert checkpoint_format("plain", 1) == checkpoint_format("DDP", 8) == "whole"
    assert checkpoint_format("FSDP", 2) == checkpoint_format("FSDP", 8) != "whole"
    assert len({checkpoint_format(*one) for one in (("ZeRO-2", 8), ("ZeRO-3", 8), ("ZeRO-2", 4))}) == 3


def states() -> dict[str, Any]:
    """What the Trainer saves beside the weights, by file."""
    moments = {name: torch.ones(9) for name in ("exp_avg", "exp_avg_sq")}
    drawn = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}  # noqa: NPY002
    return {
        "optimizer.pt": {"state": {0: moments}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        "scheduler.pt": {"last_epoch": 2},
        "rng_state.pth": drawn,
    }


def save_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(f'{{"global_step": {folder.name[11:]}, "log_history": []}}')
    for name, state in states().items():
        torch.save(state, folder / name)
    save_file({"a.weight": torch.ones(9)}, folder / "model.safetensors")
    return folder


def test_a_checkpoint_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    def training(**options: object) -> TrainArguments:
        return TrainArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    assert checkpoint_to_resume(training()) is None
    for number in (2, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(f'{{"global_step": {number}, "log_history": []}}')
    for name, (file, state) in zip(("optimizer", "schedule", "random"), states().items(), strict=True):
        with pytest.raises(ValueError, match=rf"checkpoint-10: has no {name} state.*--save_only_model"):
            checkpoint_to_resume(training())
        for number in (2, 10):
            torch.save(state, tmp_path / f"checkpoint-{number}" / file)
    assert checkpoint_to_resume(training()) == str(tmp_path / "checkpoint-10")
    for number in (3, 9, 5):
        (tmp_path / f"checkpoint-{number}").mkdir()
        state = f'{{"global_step": {number}, "log_history": [{{"step": {number}}}]}}'
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    # Not whole, not a folder, and not a number.
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").write_text("")
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoint_to_resume(training()) == newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    chosen = str(tmp_path / "checkpoint-2")
    assert checkpoint_to_resume(training(resume_from_checkpoint=chosen)) == chosen
    with pytest.raises(ValueError, match=r"checkpoint-11: not the folder of a whole checkpoint"):
        checkpoint_to_resume(training(resume_from_checkpoint=str(tmp_path / "checkpoint-11")))
    for state in ('{"global_step": "2", "log_history": []}', '{"global_step": 2, "log_history": [{}]}', "[]"):
        (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state)
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    for number in (2, 10):
        save_file({"a": torch.full((1,), torch.inf)}, tmp_path / f"checkpoint-{number}" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^\S*checkpoint-10\S*: damaged; there is no other checkpoint to"):
        checkpoint_to_resume(training())


class Code:
    """Its pickle is code, which writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "it ran")


def test_an_aligner_and_pickles_are_looked_at_and_shards_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    folder = save_checkpoint(tmp_path / "checkpoint-2")
    (folder / "motion_aligner").mkdir()
    save_file({"a.weight": torch.tensor([torch.nan])}, folder / "motion_aligner" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-2: the weight a\.weight is NaN or infinite"):
        checkpoint_to_resume(training)
    torch.save(Code(tmp_path / "ran"), folder / "rng_state.pth")
    with pytest.raises(ValueError, match=r"rng_state\.pth: damaged \(UnpicklingError\)"):
        checkpoint_to_resume(training)
    assert not (tmp_path / "ran").exists(), "no code of a checkpoint runs"
    (folder / "optimizer.pt").unlink()
    monkeypatch.setattr("motionenhancer.training.run_identity.engine_of", lambda _: "FSDP")
    assert checkpoint_to_resume(training) == str(folder)


@pytest.mark.parametrize(
    "harm",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "no scheduler", "weights", "nan"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    save_checkpoint(tmp_path / "checkpoint-2")
    folder = save_checkpoint(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(training) == str(folder)
    named = f"{folder / harm}: damaged"
    if harm == "no scheduler":
        (folder / "scheduler.pt").unlink()
        named = f"{folder}: has no schedule state (scheduler.pt)"
    elif harm == "nan":
        save_file({"a.weight": torch.tensor([1.0, torch.nan])}, folder / "model.safetensors")
        named = f"{folder}: the weight a.weight is NaN or infinite"
    else:
        file = folder / ("model.safetensors" if harm == "weights" else harm)
        named = f"{file}: cannot be read" if harm == "weights" else named
        file.write_bytes(file.read_bytes()[:-30])
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-2")
    said = capsys.readouterr().err
    assert said.startswith(named)
    assert "checkpoint-2 is taken instead" in said
    training.resume_from_checkpoint = str(folder)
    with pytest.raises(ValueError, match=r"checkpoint-10"):
        checkpoint_to_resume(training)


def wrong_states() -> Iterator[tuple[str, Any, str]]:
    """A file of a checkpoint, a state in it that can be read, and what is said about it."""
    optimizer = states()["optimizer.pt"]
    moments = optimizer["state"][0]
    yield "optimizer.pt", [1], "damaged (TypeError)"
    yield "optimizer.pt", {"state": {}, "param_groups": []}, "holds no parameters"
    for kept in ({}, {0: moments, 1: {}}):
        groups = [{"betas": (0.9, 0.999), "params": [0, 1]}]
        yield "optimizer.pt", {"state": kept, "param_groups": groups}, "holds no moments of some of its"
    yield "scheduler.pt", [1], "damaged (TypeError)"
    yield "scheduler.pt", {"a": 1}, "damaged (KeyError)"
    yield "rng_state.pth", [1], "damaged (TypeError)"
    for kind, value in (("python", 1), ("numpy", 2), ("cpu", torch.zeros(3))):
        yield "rng_state.pth", {**states()["rng_state.pth"], kind: value}, "damaged (TypeError)"
    for value, said in (
        (torch.zeros(3), "0.exp_avg has another shape than 0.exp_avg_sq"),
        (torch.full((9,), torch.nan), "0.exp_avg is NaN or infinite"),
    ):
        yield "optimizer.pt", {**optimizer, "state": {0: {**moments, "exp_avg": value}}}, said
    for step in (-5, 0, 1, 999):
        said = f"global_step is {step}, not 10" if step > 0 else "damaged"
        yield "trainer_state.json", {"global_step": step, "log_history": []}, said


@pytest.mark.parametrize(("name", "state", "said"), wrong_states())
def test_a_state_that_can_be_read_but_is_wrong_gives_way_too(
    tmp_path: Path, name: str, state: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "checkpoint-2")
    file = save_checkpoint(tmp_path / "checkpoint-10") / name
    file.write_text(json.dumps(state)) if file.suffix == ".json" else torch.save(state, file)
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-2")
    printed = capsys.readouterr().err
    assert printed.startswith(f"{file}: {said}")
    assert printed.endswith("; checkpoint-2 is taken instead\n")


def test_an_optimizer_whose_steps_a_scaler_left_out_has_no_moments_yet(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint-2")
    state = {"state": {}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    torch.save(state, folder / "optimizer.pt")
    torch.save({"scale": 2.0}, folder / "scaler.pt")
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    assert checkpoint_to_resume(training) == str(folder)


def test_every_process_has_its_random_state(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint-10")
    (folder / "rng_state.pth").unlink()
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    for rank in (0, 2):
        torch.save(states()["rng_state.pth"], folder / f"rng_state_{rank}.pth")
    with pytest.raises(ValueError, match=r"checkpoint-10: has no rng_state_1\.pth"):
        checkpoint_to_resume(training)
    torch.save(states()["rng_state.pth"], folder / "rng_state_1.pth")
    assert checkpoint_to_resume(training) == str(folder)


def test_moments_of_another_shape_never_take_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused Adam on a CPU would write beyond their memory."""
    settings = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    training = AlignerTraining(torch.nn.Linear(9, 1, bias=False), settings)
    optimizer, weight = training._optimizer, training._parameters[0]
    weight.grad = torch.ones(1, 9)
    training.step(1.0)
    training.save(tmp_path / "right")
    training.load(tmp_path / "right")
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][name] = torch.ones(3)
    training.save(tmp_path / "wrong")
    said = r"the optimizer's exp_avg has shape \(3,\), its weight \(1, 9\)"
    with pytest.raises(ValueError, match=f"wrong/motion_aligner: {said}"):
        training.load(tmp_path / "wrong")
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: None)
    trainer = MotionTrainer.__new__(MotionTrainer)
    trainer.optimizer, trainer._aligner_training = optimizer, None
    with pytest.raises(ValueError, match=f"checkpoint-2: {said}"):
        trainer._load_optimizer_and_scheduler("checkpoint-2")
