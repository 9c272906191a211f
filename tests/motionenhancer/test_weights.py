"""A folder that lacks weights, or holds others, is refused by their names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import motionenhancer.toy
from motionenhancer.students import load_student
from motionenhancer.teachers import load_teacher
from motionenhancer.weights import check_loaded, check_moments, not_finite, refuse_weights, student_digest

SHIPPED = Path(motionenhancer.toy.__file__).parent / "weights"


def changed(kind: str, folder: Path, part: str, lost: str | None, added: str | None) -> Path:
    """A copy of a shipped model without its weight `lost`, and with a weight `added`."""
    shutil.copytree(SHIPPED / kind, folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    if lost is not None:
        weights.pop(lost)
    if added is not None:
        weights[added] = torch.zeros(2)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def first(kind: str, part: str) -> str:
    (file,) = (SHIPPED / kind / part).glob("*.safetensors")
    return sorted(load_file(file))[0]


def test_a_student_without_one_of_its_weights(tmp_path: Path) -> None:
    lost = first("student", "")
    with pytest.raises(ValueError, match=r"copy: 1 weight is missing \(.*\); download or save"):
        load_student(changed("student", tmp_path / "copy", "", lost, None))


def test_a_student_with_a_weight_of_another(tmp_path: Path) -> None:
    folder = changed("student", tmp_path / "copy", "", None, "model.extra.weight")
    with pytest.raises(ValueError, match=r"1 weight is not of this model \(.*extra\.weight\)"):
        load_student(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_teacher_without_one_of_its_weights(tmp_path: Path, part: str) -> None:
    folder = changed("teacher", tmp_path / "copy", part, first("teacher", part), None)
    with pytest.raises(ValueError, match=rf"copy/{part}: 1 weight is missing"):
        load_teacher(folder)


def test_a_teacher_with_a_weight_of_another(tmp_path: Path) -> None:
    folder = changed("teacher", tmp_path / "copy", "transformer", None, "audio.weight")
    with pytest.raises(
        ValueError, match=r"copy/transformer: 1 weight is not of this model \(audio\.weight\)"
    ):
        load_teacher(folder)


@pytest.mark.parametrize(("kind", "part"), [("student", ""), ("teacher", "vae"), ("teacher", "text_encoder")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, kind: str, part: str, value: float) -> None:
    shutil.copytree(SHIPPED / kind, tmp_path / "copy")
    (file,) = (tmp_path / "copy" / part).glob("*.safetensors")
    weights, name = load_file(file), first(kind, part)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    load = load_student if kind == "student" else load_teacher
    with pytest.raises(ValueError, match=rf"copy.*the weight .*{name.split('.')[-2]}.* is NaN or infinite"):
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("kind", "part"),
    [("student", ""), ("teacher", "vae"), ("teacher", "transformer"), ("teacher", "text_encoder")],
)
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, kind: str, part: str) -> None:
    shutil.copytree(SHIPPED / kind, tmp_path / "copy")
    (file,) = (tmp_path / "copy" / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{file}: cannot be read")):
        (load_student if kind == "student" else load_teacher)(tmp_path / "copy")


@pytest.mark.parametrize(
    ("kind", "part", "field", "value"),
    [
        ("student", "", "text_config", {"num_attention_heads": 0}),
        ("teacher", "text_encoder", "model_type", ["t5"]),
    ],
)
def test_a_configuration_that_makes_no_model_is_named(
    tmp_path: Path, kind: str, part: str, field: str, value: Any
) -> None:
    shutil.copytree(SHIPPED / kind, tmp_path / "copy")
    file = tmp_path / "copy" / part / "config.json"
    config = json.loads(file.read_text())
    config[field] = {**config[field], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"copy.*config\.json"):
        (load_student if kind == "student" else load_teacher)(tmp_path / "copy")


def test_buffers_that_are_computed_now_are_no_fault() -> None:
    check_loaded("m", {"missing_keys": [], "unexpected_keys": ["text.position_ids", "rotary.inv_freq"]})


def test_many_weights_are_counted() -> None:
    info = {"missing_keys": ["d", "b", "a", "c"], "unexpected_keys": ["x"]}
    with pytest.raises(ValueError, match=r"m: 4 weights are missing \(a, b, c, \.\.\.\) and 1 weight is not"):
        check_loaded("m", info)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_saved(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights of every process are checked; frozen weights were checked when they were loaded."""
    model = torch.nn.Linear(2, 2)
    refuse_weights([None, model], 3, 1)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(FloatingPointError, match="the weight bias is NaN or infinite after step 3"):
        refuse_weights([None, model], 3, 1)
    model.bias.requires_grad_(False)
    refuse_weights([None, model], 3, 1)
    monkeypatch.setattr("motionenhancer.weights.gather_object", lambda mine: [*mine, "theirs"])
    refuse_weights([model], 3, 1)
    with pytest.raises(FloatingPointError, match="the weight theirs is NaN"):
        refuse_weights([model], 3, 2)
    assert not_finite([("eight", torch.zeros(2).to(torch.float8_e4m3fn)), ("none", torch.zeros(0))]) == ""


@pytest.mark.parametrize("name", ["config.json", "a.safetensors", "chat_template.jinja", "merges.txt"])
def test_a_student_is_named_by_what_its_checkpoint_consists_of(name: str, tmp_path: Path) -> None:
    for kept in ("config.json", "a.safetensors", "chat_template.jinja", "merges.txt"):
        (tmp_path / kept).write_text("{}")
    found = student_digest(tmp_path)
    for other in ("motion_report.json", "trainer_state.json", "README.md"):
        (tmp_path / other).write_text("{}")
    (tmp_path / "checkpoint-2.json").mkdir()
    assert student_digest(tmp_path) == found
    (tmp_path / name).write_text("{ }")
    assert student_digest(tmp_path) != found


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_a_file_of_a_teacher_that_is_nested_too_deeply_is_named(tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(SHIPPED / "teacher", tmp_path / "copy"))
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{file}: not valid JSON"):
        load_teacher(folder)


def test_moments_of_which_some_are_lost_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    check_moments(optimizer, "checkpoint-1")
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"checkpoint-1: the optimizer.s state of a weight has no exp_avg_sq"
    ):
        check_moments(optimizer, "checkpoint-1")


@pytest.mark.parametrize(
    ("config", "harm", "said"),
    [
        ({"r": "a"}, "", "cannot be applied to this model (TypeError"),
        ({"peft_type": "XX"}, "", "cannot be applied to this model (KeyError"),
        ({"target_modules": "(("}, "", "cannot be applied to this model ("),
        ({"r": 4}, "", "cannot be applied to this model (RuntimeError"),
        ({}, "cut", "adapter_model.safetensors: cannot be read"),
        ({}, "lost", "Found missing adapter keys"),
        ({}, "nan", "is NaN or infinite"),
    ],
)
def test_adapters_that_are_broken_are_named(
    tmp_path: Path, config: dict[str, Any], harm: str, said: str
) -> None:
    model, _, _ = load_student(SHIPPED / "student")
    shutil.copytree(
        SHIPPED / "student", tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors", "config*")
    )
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    settings = tmp_path / "a" / "adapter_config.json"
    base = {"base_model_name_or_path": str(SHIPPED / "student")}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | base))
    load_student(tmp_path / "a")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "lost":
        save_file({key: value for key, value in weights.items() if key != name}, file)
    elif harm == "nan":
        save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, file)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'a'}.*{re.escape(said)}"):
        load_student(tmp_path / "a")
