"""Losses on validation samples, and their use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import World
from train_support import arguments, flags, parts, report_of, shared_priors, weights_of

from motionenhancer import train
from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.dataset import MotionDataset
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students.capture import capture_attention


@pytest.fixture(scope="module")
def held_out(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the samples; the other samples have the same ids."""
    file = tmp_path_factory.mktemp("held_out") / "eval.jsonl"
    file.write_text("".join(world.data.read_text().splitlines(keepends=True)[:3]))
    return file


def run(world: World, held_out: Path, out: Path, **options: Any) -> dict[str, Any]:
    chosen = {"eval_data": held_out, "eval_video_root": world.videos, "prior_dir": shared_priors(world)}
    assert train.main(flags(world, out, **{**chosen, **options})) == 0
    return report_of(out)


def evaluations(report: dict[str, Any]) -> list[dict[str, float]]:
    return [entry for entry in report["training"]["log"] if "eval_loss" in entry]


def test_both_losses_are_logged_and_training_is_as_without(
    world: World, held_out: Path, tmp_path: Path, capsys: Any
) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    report = run(world, held_out, tmp_path / "with", **steps, alignment_weight=2.0)
    assert f"eval data {held_out}, 3 samples" in capsys.readouterr().out
    found = evaluations(report)
    assert [entry["step"] for entry in found] == [0, 1, 2]
    for entry in found:
        total = entry["eval_loss_ar"] + 2 * entry["eval_loss_align"]
        assert entry["eval_loss"] == pytest.approx(total, rel=1e-6)
    assert len({entry["eval_loss_ar"] for entry in found}) == 3
    assert sum(entry["id"].startswith("eval/") for entry in report["samples"]) == 3
    options = {"prior_dir": shared_priors(world), "alignment_weight": 2.0}
    assert train.main(flags(world, tmp_path / "without", **options)) == 0
    plain = weights_of(tmp_path / "without")
    assert all(torch.equal(plain[name], value) for name, value in weights_of(tmp_path / "with").items())


def test_the_losses_are_means_over_tokens_and_samples(world: World, tmp_path: Path) -> None:
    """The batches have two samples and one sample, so a mean over batches would differ."""
    model, dataset, collator = parts(world, tmp_path)
    three = MotionDataset(
        dataset.samples[:3], dataset.family, dataset.processor, keys=dataset.keys, store=dataset.store, fps=4
    )
    training = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = MotionTrainer(
        model=model, args=training, train_dataset=dataset, eval_dataset=three, data_collator=collator
    )
    found = trainer.evaluate()
    losses, tokens, distances = 0.0, 0, []
    for item in (three[i] for i in range(3)):
        batch = collator([item])
        alignment = batch.pop("alignment")
        del batch["ids"], batch["skipped"]
        with torch.no_grad(), capture_attention(model, alignment.rows, alignment.columns) as captured:
            out = model(**batch)
        count = int((batch["labels"][:, 1:] != -100).sum())
        losses, tokens = losses + float(out.loss) * count, tokens + count
        options = {"grid": alignment.grids, "row_tokens": alignment.row_tokens}
        distances.append(float(align(captured, alignment.priors, **options)))
    assert found["eval_loss_ar"] == pytest.approx(losses / tokens, rel=1e-5)
    assert found["eval_loss_align"] == pytest.approx(sum(distances) / 3, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_sample_counts_once_on_any_number_of_processes(processes: int) -> None:
    dataset = MotionDataset.__new__(MotionDataset)
    dataset.samples = list(range(7))  # type: ignore[arg-type]
    seen, rounds = [], set()
    for rank in range(processes):
        trainer = MotionTrainer.__new__(MotionTrainer)
        trainer.eval_dataset, trainer.data_collator = dataset, list
        trainer.args = SimpleNamespace(  # type: ignore[assignment]
            eval_batch_size=2,
            world_size=processes,
            process_index=rank,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            device=torch.device("cpu"),
        )
        batches = list(trainer.get_eval_dataloader().batch_sampler)  # type: ignore[arg-type]
        rounds.add(len(batches))
        seen += [index for batch in batches[: trainer._counted] for index in batch]
    assert sorted(seen) == list(range(7))
    assert len(rounds) == 1, "all processes take part in every forward pass"


def test_the_best_weights_are_kept_and_the_run_stops_early(
    world: World, held_out: Path, tmp_path: Path
) -> None:
    """At this learning rate the loss only rises after the first steps."""
    out = tmp_path / "out"
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss_ar", "max_steps": 12}
    aligner = tmp_path / "aligner.safetensors"
    report = run(
        world,
        held_out,
        out,
        **options,
        learning_rate=0.3,
        early_stopping_patience=2,
        save_aligner=aligner,
    )
    found = [entry["eval_loss_ar"] for entry in evaluations(report)]
    best = found.index(min(found))
    assert len(found) == best + 3 < 12
    checkpoint = out / f"checkpoint-{best + 1}"
    kept, last = weights_of(checkpoint), weights_of(out / f"checkpoint-{len(found)}")
    for name, value in weights_of(out).items():
        assert torch.equal(value, kept[name])
    assert any(not torch.equal(value, last[name]) for name, value in kept.items())
    saved = load_file(checkpoint / "motion_aligner" / "aligner.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in load_file(aligner).items())


def test_the_best_checkpoint_alone_is_saved(world: World, held_out: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 3}
    options |= {"load_best_model_at_end": True, "learning_rate": 1e-4, "alignment_weight": 0}
    report = run(world, held_out, tmp_path / "out", **options, metric_for_best_model="eval_loss_ar")
    found = [entry["eval_loss_ar"] for entry in evaluations(report)]
    assert found == sorted(found, reverse=True)
    assert "eval_loss_align" not in evaluations(report)[0]
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_priors_of_the_evaluation_are_made_while_training_too(
    world: World, held_out: Path, tmp_path: Path
) -> None:
    """The same maker makes them, and they equal stored priors."""
    stored = evaluations(run(world, held_out, tmp_path / "stored", eval_strategy="epoch"))
    made = evaluations(run(world, held_out, tmp_path / "made", prior_source="online"))
    assert [e["eval_loss_align"] for e in made] == [e["eval_loss_align"] for e in stored]


def test_priors_that_are_missing_are_made_with_two_commands(
    world: World, held_out: Path, tmp_path: Path, capsys: Any
) -> None:
    options = {"eval_data": held_out, "eval_video_root": world.videos, "prior_source": "store"}
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    said = capsys.readouterr().err
    assert f"--data {world.data} --video_root {world.videos}" in said
    assert f"--data {held_out} --video_root {world.videos}" in said


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"eval_strategy": "epoch"}, "--eval_strategy needs --eval_data"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model needs --eval_data"),
        ({"save_strategy": "best"}, "--save_strategy"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs --eval_data"),
        ({"eval_data": "DATA", "early_stopping_patience": 2}, "needs --load_best_model_at_end true"),
        ({"eval_data": "DATA", "early_stopping_patience": 0}, "must be at least 1, got 0"),
        ({"eval_data": "DATA", "metric_for_best_model": "accuracy"}, "invalid choice: 'accuracy'"),
        (
            {"eval_data": "DATA", "metric_for_best_model": "loss_align", "alignment_weight": 0},
            "--metric_for_best_model loss_align: nothing is aligned",
        ),
        ({"eval_data": "nowhere.jsonl"}, "--eval_data must be a file that exists, got nowhere.jsonl"),
        (
            {"eval_data": "DATA", "data": None, "teacher": None, "student": None, "video_fps": None},
            "--eval_data needs --data",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_read(
    world: World,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    options: dict[str, Any],
    error: str,
) -> None:
    monkeypatch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("went on to the data"))
    given = {name: held_out if value == "DATA" else value for name, value in options.items()}
    try:
        code = train.main(flags(world, tmp_path / "out", **given))
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_to_choose_the_best_by_make_another_run(
    world: World, held_out: Path, tmp_path: Path, capsys: Any
) -> None:
    run(world, held_out, tmp_path / "out")
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    argv = {"eval_data": other, "eval_video_root": world.videos, "prior_dir": shared_priors(world)}
    assert train.main(flags(world, tmp_path / "out", **argv)) == 2
    assert "eval_data" in capsys.readouterr().err


def test_the_best_adapters_are_kept(world: World, held_out: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    out = tmp_path / "out"
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "lora_r": 2, "max_steps": 4, "learning_rate": 3.0}
    found = [entry["eval_loss"] for entry in evaluations(run(world, held_out, out, **options))]
    best = found.index(min(found)) + 1
    assert best < len(found), "a rate at which the last step is not the best"
    files = [folder / "adapter_model.safetensors" for folder in (out, out / f"checkpoint-{best}")]
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
