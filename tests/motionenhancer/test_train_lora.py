"""Adapters train like whole weights, and the saved files are in PEFT's or the family's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_world import World
from train_support import Died, arguments, dying, flags, parts, report_of, shared_priors, weights_of

from motionenhancer import eval as evaluation
from motionenhancer import train
from motionenhancer.alignment.aligner import build_aligner
from motionenhancer.alignment.trainer import MotionTrainer
from motionenhancer.settings import StudentArguments
from motionenhancer.students import load_student
from motionenhancer.toy.models import make_student, save_student
from motionenhancer.training.lora import add_lora

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def attention_weights(model: Any) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return {k: v for k, v in named.items() if k.endswith(ATTENTION) and "language_model" in k}


def test_adapters_of_full_rank_train_what_the_weights_themselves_would(world: World, tmp_path: Path) -> None:
    """With A the identity and fixed, B is the weight's own change: gradient descent takes the same steps."""
    kept = []
    for adapters in (False, True):
        model, dataset, collator = parts(world, tmp_path)
        if adapters:
            model = add_lora(
                model, StudentArguments(lora_r=64, lora_alpha=64, lora_target="q_proj,k_proj,v_proj"), seed=0
            )
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    torch.nn.init.eye_(parameter)
                parameter.requires_grad_("lora_B" in name)
        else:
            chosen = {id(p) for p in attention_weights(model).values()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
        trainer = MotionTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, optim="sgd", learning_rate=0.5, weight_decay=0.0),
            train_dataset=dataset,
            data_collator=collator,
            alignment_weight=10.0,
            aligner=build_aligner("mlp", (5, 8, 8)),
        )
        trainer.train()
        log = [entry["loss_align"] for entry in trainer.state.log_history if "loss_align" in entry]
        kept.append((log, attention_weights(model.merge_and_unload() if adapters else model)))
    start = attention_weights(load_student(world.student)[0])
    assert kept[1][0] == pytest.approx(kept[0][0], rel=1e-5)
    assert len(start) == 6
    for name, value in kept[0][1].items():
        assert float((value - start[name]).abs().max()) > 1e-3, name
        torch.testing.assert_close(kept[1][1][name], value, rtol=0, atol=1e-5, msg=name)


def test_the_adapter_is_pefts_and_the_merged_model_the_familys(world: World, tmp_path: Path) -> None:
    options = {"lora_r": 4, "max_steps": 3, "prior_dir": shared_priors(world)}
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    assert train.main(flags(world, adapter, **options)) == 0
    assert train.main(flags(world, whole, lora_merge=True, **options)) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert not (adapter / "model.safetensors").exists()
    items = parts(world, tmp_path, priors=False)
    batch = {k: v for k, v in items[2]([items[1][0]]).items() if k not in ("alignment", "ids", "skipped")}
    logits = []
    for folder in (adapter, whole, world.student):
        model = load_student(folder)[0]
        assert isinstance(model, PeftModel) == (folder == adapter)
        with torch.no_grad():
            logits.append(model(**batch).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert float((logits[0] - logits[2]).abs().max()) > 1e-3
    asked = ["--data", world.data, "--video_root", world.videos, "--output_dir", tmp_path / "scored"]
    asked += ["--student", adapter, "--limit", 2, "--bootstrap_samples", 0]
    assert evaluation.main([*map(str, asked)]) == 0
    assert (report_of(tmp_path / "scored")["identity"]["frames"]["fps"]) == 4, "as it was trained"
    assert 'library_name: "peft"' in (adapter / "README.md").read_text()
    assert not list(whole.glob("adapter*"))
    plan = {part["name"]: part for part in report_of(adapter)["plan"]["parts"]}
    assert plan["vision tower"]["trained"] == plan["output head"]["trained"] == 0
    assert 0 < plan["language model"]["trained"] < plan["language model"]["parameters"]
    before, after = weights_of(world.student), weights_of(whole)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        n for n in before if ".layers." in n and n.endswith("proj.weight") and "visual" not in n
    }
    # Plain PEFT on the plain student is the merged model.
    base, processor, _ = load_student(world.student)
    with_adapter = PeftModel.from_pretrained(base, adapter)
    ids = processor.tokenizer("The red square moves left", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = with_adapter(input_ids=ids).logits, load_student(whole)[0](input_ids=ids).logits
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with with_adapter.disable_adapter():
            assert float((with_adapter(input_ids=ids).logits - a).abs().max()) > 1e-3


def randomise(model: Any) -> None:
    """Adapters begin as the identity; give them something to add."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def save_tied_student(folder: Path) -> Path:
    """The tiny student with one weight for its embeddings and its output head, as the 3B models have."""
    model, processor = make_student(layers=2)
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj,lm_head"])
def test_adapters_on_tied_embeddings_are_not_merged(
    world: World, tmp_path: Path, target: str, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merge would change the layer at the other end too; it is refused before any prior is made."""
    options = {"student": save_tied_student(tmp_path / "tied"), "lora_r": 2, "lora_target": target}
    options |= {"prior_dir": tmp_path / "priors", "dry_run": dry_run, "lora_merge": True}
    assert train.main(flags(world, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --lora_merge: ")
    assert target.split(",")[-1] in error
    assert "q_proj" not in error
    assert not (tmp_path / "priors").exists()


@pytest.mark.parametrize(
    ("tied", "target"),
    [
        (True, "q_proj,down_proj"),
        (True, "language"),
        (True, "all"),
        (False, "lm_head"),
        (False, "embed_tokens"),
    ],
)
def test_what_is_merged_gives_the_adapters_logits(tmp_path: Path, tied: bool, target: str) -> None:
    student = (
        save_tied_student(tmp_path / "student") if tied else save_student(tmp_path / "student", layers=2)
    )
    base, processor, _ = load_student(student)
    model = add_lora(base, StudentArguments(lora_r=3, lora_target=target, lora_merge=True), seed=0)
    randomise(model)
    ids = processor.tokenizer("The red square moves left", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        processor.save_pretrained(tmp_path / "merged")
        found = load_student(tmp_path / "merged")[0](input_ids=ids).logits
        plain = load_student(student)[0](input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((plain - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_tied_embeddings_comes_back(tmp_path: Path, target: str) -> None:
    student = save_tied_student(tmp_path / "student")
    base, processor, _ = load_student(student)
    model = add_lora(base, StudentArguments(lora_r=3, lora_target=target), seed=0)
    randomise(model)
    ids = processor.tokenizer("The red square moves left", return_tensors="pt").input_ids
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_student(student)[0], tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_killed_run_of_adapters_goes_on(world: World, tmp_path: Path) -> None:
    options = {"lora_r": 2, "lora_target": "all", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"prior_dir": shared_priors(world), "lora_dropout": 0.1}
    outs = [tmp_path / "whole", tmp_path / "cut"]
    assert train.main(flags(world, outs[0], **options)) == 0
    with dying(3), pytest.raises(Died):
        train.main(flags(world, outs[1], **options))
    assert train.main(flags(world, outs[1], **options)) == 0
    files = [out / "adapter_model.safetensors" for out in outs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (outs[0] / "checkpoint-2" / "adapter_model.safetensors").read_bytes() != files[0].read_bytes()


def test_a_rank_above_that_of_every_layer_is_refused() -> None:
    """PEFT would ask for the memory: 256 GB a layer."""
    base = make_student(layers=1)[0]
    most = max(min(p.shape) for m in base.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight])
    with pytest.raises(ValueError, match=f"--lora_r {most + 1}: must be at most {most}, "):
        add_lora(base, StudentArguments(lora_r=most + 1), seed=0)
    add_lora(base, StudentArguments(lora_r=most), seed=0)
