"""The training command on tiny real models: what it leaves behind and what it equals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_world import World
from train_support import Weights, arguments, flags, parts, report_of, shared_priors, weights_of
from transformers import Trainer

from motionenhancer import eval as evaluation
from motionenhancer import train
from motionenhancer.alignment.aligner import align, build_aligner
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.students import capture_attention, load_student
from motionenhancer.toy import defaults


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    assert train.main(flags(world, out, measure_roundtrip=True)) == 0
    return out


def test_the_flags_of_what_is_read_reach_the_capture(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads of one layer are read, and the map of each is aligned."""
    read = []

    @contextmanager
    def capture(*args: Any, **options: Any) -> Iterator[Any]:
        with capture_attention(*args, **options) as captured:
            yield captured
        read.append((options, tuple(captured.attention.shape[1:3])))

    monkeypatch.setattr("motionenhancer.alignment.trainer.capture_attention", capture)
    given = {"alignment_layers": 1, "alignment_reduce": "none"}
    argv = flags(world, tmp_path / "out", prior_dir=shared_priors(world), max_steps=1, **given)
    assert train.main([*argv, "--alignment_heads", "0", "2"]) == 0
    assert read[0] == ({"layers": [1], "heads": [0, 2], "reduce": "none"}, (1, 2))
    assert report_of(tmp_path / "out")["alignment"]["aligned_samples"] > 0


# ---- what a run leaves behind ----


def test_the_checkpoint_loads_without_this_package(trained: Path, world: World) -> None:
    """A fresh interpreter with transformers alone loads, runs and finds nothing of ours."""
    script = f"""
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model, info = AutoModelForImageTextToText.from_pretrained({str(trained)!r}, output_loading_info=True)
processor = AutoProcessor.from_pretrained({str(trained)!r})
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = processor.tokenizer("The red square", return_tensors="pt").input_ids
assert torch.isfinite(model(input_ids=ids).logits).all()
assert not any(name.startswith(("motionenhancer", "mekernels")) for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert set(weights_of(trained)) == set(weights_of(world.student))
    assert json.loads((trained / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_training_moved_the_weights(trained: Path, world: World) -> None:
    before, after = weights_of(world.student), weights_of(trained)
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) // 2


def test_a_run_that_aligned_nothing_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher's text stands before the video, so no word can attend to the video."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    for row in rows:
        asked = row["conversations"][0]
        asked["value"] = asked["value"].replace("<video>", "").strip() + "\n<video>"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": data, "prompt_source": "question"}
    assert train.main(flags(world, tmp_path / "out", **options)) == 1
    said = capsys.readouterr().err
    assert "--alignment_weight 1.0: no word of a prior was found in any of the 4 samples" in said
    assert report_of(tmp_path / "out")["alignment"]["aligned_samples"] == 0
    assert train.main(flags(world, tmp_path / "plain", alignment_weight=0, data=data)) == 0


def test_the_report_says_what_was_read(trained: Path) -> None:
    report = report_of(trained)
    assert report["status"] == "finished"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"]
    assert len(report["samples"]) == 8
    for sample in report["samples"]:
        assert len(sample["heads"]) == 2
        assert {len(v) for v in sample["head_scores"].values()} == {4}
        assert sample["kept_tokens"]
        assert sample["dropped_tokens"]
        assert all(token["text"] in sample["prompt"] for token in sample["kept_tokens"])
        assert sample["seconds"]["reconstruct"] > 0
    assert 0 < report["teacher"]["roundtrip"]["whole_schedule"] < 10
    assert report["alignment"]["aligned_samples"] == 4
    assert report["alignment"]["mapped_words"] == report["alignment"]["words"] > 0
    logged = [entry for entry in report["training"]["log"] if "loss_align" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["loss_ar"] + entry["loss_align"], rel=1e-3)


def test_the_toy_default_compares_with_plain_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No student, teacher or data named: the toy world is made and its recipe used; numbers are cut down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(defaults._WORLDS, "motion", ("runs/toy_motion", 5, 10))
    cut = ["--limit", "4", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    assert train.main(cut) == 0
    out = capsys.readouterr().out
    assert "checkpoint and motion_report.json in runs/train" in out
    report, plain = report_of(tmp_path / "runs" / "train"), report_of(tmp_path / "runs" / "train_plain")
    assert report["identity"]["learning_rate"] == 0.003
    assert len(list((tmp_path / "runs" / "toy_motion" / "videos").glob("*.mp4"))) == 5 + 10
    found = report["evaluation"]
    assert list(found) == ["before", "plain", "after"]
    assert plain["evaluation"] == {"before": found["before"], "after": found["plain"]}
    other = {k for k, v in plain["identity"].items() if v != report["identity"].get(k)}
    assert "alignment_weight" in other
    assert not other & {"student", "data", "seed", "learning_rate", "max_steps"}, "the same start"
    assert plain["alignment"]["aligned_samples"] == 0
    for name, one in found.items():
        assert list(one["tasks"]) == ["MR"]
        assert one["overall"] == pytest.approx(np.mean(list(one["tasks"].values())))
        rows = [line for line in out.splitlines() if line.startswith(f"{name}  ")]
        assert f"{one['overall']:.1f}%" in rows[-1], "the table of the second run is the last one"
    toy = "runs/toy_motion"
    students = (("before", f"{toy}/student"), ("plain", "runs/train_plain"), ("after", "runs/train"))
    for name, student in students:
        asked = ["--data", f"{toy}/test.jsonl", "--video_root", f"{toy}/videos", "--student", student]
        assert evaluation.main([*asked, "--batch_size", "100", "--output_dir", name]) == 0
        scores = json.loads(Path(name, "scores.json").read_text())
        assert scores["overall"] == pytest.approx(found[name]["overall"])
        tasks = {task: one["accuracy"] for task, one in scores["tasks"].items()}
        assert tasks == pytest.approx(found[name]["tasks"])
    card = Path("runs/train/README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["motionenhancer"],
    }, "no base model: a path is none to the Hub"
    counts = report["alignment"]
    for said in (
        "base model: `runs/toy_motion/student`",
        "teacher: `runs/toy_motion/teacher`",
        "data: `runs/toy_motion/train.jsonl`, 4 samples",
        f"{100 * counts['mapped_words'] / counts['words']:.1f} % of the prior's words found",
        "| `alignment_weight` | 3.0 |",
        f"| before | {found['before']['overall']:.1f} % |",
        f"| after | {found['after']['overall']:.1f} % |",
    ):
        assert said in card
    assert evaluation.main(["--compare", f"{toy}/student", "runs/train"]) == 2
    assert f"not evaluated yet; run eval --student {toy}/student first" in capsys.readouterr().err
    Path("after").rename("runs/after")
    assert evaluation.main(["--compare", "before", "runs/train"]) == 0
    assert "10 questions" in capsys.readouterr().out
    shutil.copytree("runs/after", "runs/again")
    assert evaluation.main(["--compare", "before", "runs/train"]) == 2
    assert "evaluated more than once; give one of runs/after, runs/again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (
            ["--aligner", "conv", "--save_aligner", "a.safetensors", "--alignment_reduce", "none"],
            0,
            "0 texts cut",
        ),
        (["--save_aligner", "a.bin", "--aligner", "conv"], 2, "--save_aligner must be a .safetensors file"),
        (["--prior_prefetch", "3", "--prior_source", "store"], 2, "--prior_prefetch"),
    ],
)
def test_the_toys_plain_run_takes_the_flags_of_its_aligned_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    said: str,
) -> None:
    """Flags that only an alignment needs do not stop the plain run; wrong ones end the command before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(defaults._WORLDS, "motion", ("runs/toy_motion", 2, 1))
    cut = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--report_samples", "0"]
    assert train.main([*cut, *flags]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert Path("runs/train_plain").exists() == Path("a.safetensors").exists() == (code == 0)


# ---- what a run equals ----


def test_weight_zero_is_the_plain_trainer_bit_for_bit(world: World, tmp_path: Path) -> None:
    model, dataset, collator = parts(world, tmp_path)

    def plain_collator(items):
        batch = collator(items)
        return {k: v for k, v in batch.items() if k not in ("alignment", "ids", "skipped")}

    plain, ours, measured = Weights(), Weights(), Weights()
    settings = arguments(tmp_path, max_steps=3)
    Trainer(
        model=model, args=settings, train_dataset=dataset, data_collator=plain_collator, callbacks=[plain]
    ).train()
    for kept, measure in ((ours, False), (measured, True)):
        again, _, _ = load_student(world.student)
        MotionTrainer(
            model=again,
            args=settings,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[kept],
            alignment_weight=0.0,
            measure_alignment=measure,
        ).train()
    for step, (a, b, c) in enumerate(zip(plain.steps, ours.steps, measured.steps, strict=True)):
        for name in a:
            assert torch.equal(a[name], b[name]), (step, name)
            assert torch.equal(a[name], c[name]), (step, name)


def test_weight_one_lowers_the_alignment_loss(world: World, tmp_path: Path) -> None:
    finals = {}
    for weight in (0.0, 1.0):
        model, dataset, collator = parts(world, tmp_path)
        trainer = MotionTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=16, per_device_train_batch_size=4),
            train_dataset=dataset,
            data_collator=collator,
            alignment_weight=weight,
            measure_alignment=True,
        )
        trainer.train()
        finals[weight] = [e["loss_align"] for e in trainer.state.log_history if "loss_align" in e]
    assert finals[0.0][0] == finals[1.0][0], "both start from the same weights and batch"
    # Same batches in the same order, so that every step can be compared with its counterpart.
    assert all(pulled < free for free, pulled in zip(finals[0.0][6:], finals[1.0][6:], strict=True))


def test_checkpointing_changes_nothing(world: World, tmp_path: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        model, dataset, collator = parts(world, tmp_path)
        weights = Weights()
        MotionTrainer(
            model=model,
            args=arguments(tmp_path, gradient_checkpointing=checkpointing),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[weights],
        ).train()
        kept.append(weights.steps[-1])
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_aligner_is_trained_and_left_out_of_the_checkpoint(world: World, tmp_path: Path) -> None:

    model, dataset, collator = parts(world, tmp_path)
    aligner = build_aligner("mlp", (5, 8, 8))
    before = {k: v.clone() for k, v in aligner.state_dict().items()}
    trainer = MotionTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=dataset,
        data_collator=collator,
        aligner=aligner,
    )
    trainer.train()
    after = aligner.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in aligner.parameters()), "gradients must not pile up over steps"
    folder = tmp_path / "out" / "checkpoint-2"
    assert set(load_file(folder / "model.safetensors")) == set(weights_of(world.student))

    # Resumed at step 2, the run ends where the undisturbed one did, the aligner included.
    fresh, dataset, collator = parts(world, tmp_path)
    again = build_aligner("mlp", (5, 8, 8))
    resumed = MotionTrainer(
        model=fresh,
        args=arguments(tmp_path, max_steps=4),
        train_dataset=dataset,
        data_collator=collator,
        aligner=again,
    )
    resumed.train(resume_from_checkpoint=str(folder))
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0, msg=name)
    for (name, a), (_, b) in zip(
        trainer.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(flags(world, whole, **options)) == 0
    shutil.copytree(whole, cut)
    # As if killed twice: checkpoint 6 has no trainer state, and checkpoint 4 has half of it.
    (cut / "checkpoint-6" / "trainer_state.json").unlink()
    state = cut / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    (cut / "model.safetensors").unlink()
    begun = []
    load = MotionTrainer._load_from_checkpoint

    def spy(self: MotionTrainer, folder: str, model: object = None) -> None:
        begun.append(Path(folder).name)
        load(self, folder, model)

    monkeypatch.setattr(MotionTrainer, "_load_from_checkpoint", spy)
    assert train.main(flags(world, cut, **options)) == 0
    assert begun == ["checkpoint-2"]
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(cut)[name], value, rtol=0, atol=0, msg=name)
    for name in ("aligner", "optimizer"):
        file = f"checkpoint-6/motion_aligner/{name}.safetensors"
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_reentrant"):
        arguments(
            tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        )


def test_the_gate_scales_each_samples_pull_by_its_confidence(world: World, tmp_path: Path) -> None:

    model, dataset, collator = parts(world, tmp_path)
    batch = collator([dataset[0], dataset[1]])
    alignment, _, _ = (batch.pop(name) for name in ("alignment", "ids", "skipped"))
    with capture_attention(model, alignment.rows, alignment.columns) as captured, torch.no_grad():
        model(**batch)
    chosen = {"grid": alignment.grids, "row_tokens": alignment.row_tokens}

    def one(which: int) -> torch.Tensor:
        priors = [prior if i == which else None for i, prior in enumerate(alignment.priors)]
        return align(captured, priors, **chosen)

    first, second = one(0), one(1)
    sure = [prior.confidence["confidence"] for prior in alignment.priors]
    assert 0 < sure[0] < 1
    assert sure[0] != sure[1]
    trainer = MotionTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=dataset,
        data_collator=collator,
        confidence_gate=max(sure),
    )
    weights = [c / max(sure) for c in sure]
    gated = trainer._align(captured, alignment, 1.0)[0]
    torch.testing.assert_close(gated, (weights[0] * first + weights[1] * second) / 2)
    trainer.confidence_gate = 0.0
    torch.testing.assert_close(trainer._align(captured, alignment, 1.0)[0], (first + second) / 2)
    trainer.prior_temperature = 0.5
    sharp = align(captured, alignment.priors, **chosen, temperature=0.5)
    torch.testing.assert_close(trainer._align(captured, alignment, 1.0)[0], sharp)
    assert sharp != (first + second) / 2


def test_the_vision_tower_learns_at_its_own_rate(world: World, tmp_path: Path) -> None:
    model, dataset, collator = parts(world, tmp_path)
    family = dataset.family
    trainer = MotionTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, optim="sgd", weight_decay=0.1),
        train_dataset=dataset,
        data_collator=collator,
        learning_rates=lambda name: 0.0 if family.in_vision_tower(name) else None,
    )
    before = {k: v.clone() for k, v in model.named_parameters()}
    trainer.train()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    tower = {k for k in before if family.in_vision_tower(k)}
    assert any(".visual.blocks." in f".{name}" for name in tower)
    assert not moved & tower
    assert any("merger" in name for name in moved)
    assert any("language_model" in name for name in moved)
    counted = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert counted == len(before)
    decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    bias = next(name for name in tower if "qkv.bias" in name)
    kernel = next(name for name in tower if "qkv.weight" in name)
    assert (decays[id(named[bias])], decays[id(named[kernel])]) == (0.0, 0.1)
