"""Loading students and finding their family."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from students_support import clip, dialogue

from motionenhancer.students import known_families, load_student, student_family
from motionenhancer.students.load import load_processor
from motionenhancer.students.locate import attention_modules, text_model, unwrap_model
from motionenhancer.training.run_plan import outline_student


@pytest.fixture
def copy(student_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student_dir, tmp_path / "student"))


def test_loads_an_ordinary_folder(student_dir: Path) -> None:
    model, processor, family = load_student(student_dir)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert family.name == "qwen2_5_vl"
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_device_and_attention(student_dir: Path, dtype: Any) -> None:
    model, _, _ = load_student(str(student_dir), dtype=dtype, device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"


def test_a_text_beyond_the_models_positions_is_refused(copy: Path) -> None:
    """Attention over a text of a megabyte would take hours. A tokenizer without a limit has the model's."""
    tokens = json.loads((copy / "tokenizer_config.json").read_text())
    assert tokens.pop("model_max_length") == 4096
    (copy / "tokenizer_config.json").write_text(json.dumps(tokens))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 200
    (copy / "config.json").write_text(json.dumps(config))
    _, processor, family = load_student(copy)
    videos = [clip(4, 128, 128)]
    within = family.encode(processor, dialogue("x" * 100, "y"), videos)
    assert len(within.input_ids) > 200, "the tokens of a video do not count"
    with pytest.raises(ValueError, match=r"'sample': its text has \d+ tokens, .* reads at most 200"):
        family.encode(processor, dialogue("x " * 200, "y"), videos)
    processor.save_pretrained(copy / "saved")
    saved = json.loads((copy / "saved" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] > 10**9, "a run saves the tokenizer without a limit, as it was"


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be a folder of a transformers model, got"):
        load_student(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: not a JSON object"),
        ("{}", "without model_type"),
        (
            json.dumps({"model_type": "kimi_k25"}),
            r"model_type 'kimi_k25' is not supported: .* latent attention \(MLA\), which cannot be read",
        ),
        (json.dumps({"model_type": "qwen4_exp"}), "keys that an indexer chooses"),
        (json.dumps({"model_type": "hy_v4_vl"}), "attention sinks"),
        (
            json.dumps({"model_type": "bert"}),
            r"model_type must be one of \[.*'qwen2_5_vl'.*\], got 'bert'",
        ),
    ],
)
def test_bad_configurations(copy: Path, content: str, message: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_student(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable weights"):
        load_student(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no readable weights"):
        load_student(copy)


def test_a_tokenizer_with_more_tokens_than_the_model(copy: Path) -> None:
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 10**6, "content": "<|beyond|>"})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=r"tokens up to number \d+, its model embeddings for \d+ tokens only"
    ):
        load_student(copy)


def test_no_processor(copy: Path) -> None:
    for file in copy.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(ValueError, match="no readable processor"):
        load_student(copy)


@pytest.mark.parametrize(
    ("file", "body", "said"),
    [
        *(
            (f"{name}.json", "[" * 100_000, f"{name}.json: not valid JSON (nested too deeply)")
            for name in ("adapter_config", "generation_config", "tokenizer_config", "tokenizer")
        ),
        *(
            (f"{name}.json", '{"a":' * 100_000, f"{name}.json: not valid JSON (nested too deeply)")
            for name in ("preprocessor_config", "video_preprocessor_config", "processor_config")
        ),
        ("processor_config.json", "[]", "no readable processor: 'list' object"),
    ],
)
def test_a_file_that_a_library_cannot_parse_ends_in_one_line(
    copy: Path, file: str, body: str, said: str
) -> None:
    if "preprocessor" in file:  # As folders have them that older versions of transformers saved.
        parts = json.loads((copy / "processor_config.json").read_text())
        (copy / "processor_config.json").unlink()
        (copy / "preprocessor_config.json").write_text(json.dumps(parts["image_processor"]))
    (copy / file).write_text(body)
    with pytest.raises(ValueError, match=f"{re.escape(str(copy))}.*{re.escape(said)}"):
        load_student(copy)


def test_no_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        load_student(copy)


def test_a_chat_template_that_is_no_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("a" * (10**6 + 1))
    with pytest.raises(ValueError, match="has a chat template of more than 1000000 characters"):
        load_student(copy)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% if messages|length == 2 %}{% for i in range(99999) %}{{ i }},{% endfor %}{% endif %}",
    ],
)
def test_a_chat_template_without_an_end(copy: Path, template: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"{re.escape(str(copy))}.*chat template that does not end"):
        load_student(copy)


def test_counting_the_lines_of_a_template_leaves_a_debugger_in_place(copy: Path) -> None:
    def debugger(*given: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        load_processor(copy)
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_families() -> None:
    families = known_families()
    assert "qwen2_5_vl" in families
    for model_type, family in families.items():
        assert model_type in family.model_types
        assert student_family(model_type) is family


def test_family_of_wrapped_models(student_dir: Path) -> None:
    model, _, family = load_student(student_dir)
    assert student_family(model) is family
    assert student_family(model.config) is family
    compiled = torch.compile(model)
    assert unwrap_model(compiled) is model
    assert student_family(compiled) is family
    with pytest.raises(ValueError, match="got None"):
        student_family(torch.nn.Linear(1, 1))


def test_attention_of_the_language_model_only(student_dir: Path) -> None:
    model, _, _ = load_student(student_dir)
    language = model.model.language_model
    assert text_model(model) is language
    assert attention_modules(model) == [layer.self_attn for layer in language.layers]
    assert attention_modules(language) == attention_modules(model)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert unwrap_model(wrapped) is model
    assert attention_modules(torch.nn.DataParallel(wrapped)) == attention_modules(model)


@pytest.mark.parametrize(
    ("section", "fields", "says"),
    [
        ("text_config", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping is 20.0; the installed"),
        ("text_config", {"sinks": True}, "sinks is True; the installed"),
        (None, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; the installed"),
        ("text_config", {"rope_parameters": {"rope_type": "new", "rope_theta": 1.0}}, "rope_type is 'new'"),
        ("text_config", {"hidden_act": "new"}, "hidden_act is 'new'"),
        (None, {"quantization_config": {"quant_method": "new"}}, "quant_method 'new'"),
        ("text_config", {"layer_types": ["new", "full_attention"]}, "layer_types"),
    ],
)
def test_what_the_installed_transformers_does_not_compute_is_refused_by_name(
    copy: Path, section: str | None, fields: dict[str, object], says: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (config if section is None else config[section]).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    for load in (load_student, lambda path: outline_student(path, "sdpa", torch.float32)):
        with pytest.raises(ValueError, match=f"{re.escape(str(copy / 'config.json'))}: .*{says}"):
            load(copy)


def test_what_is_switched_off_is_let_pass(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"attn_logit_softcapping": None, "sinks": False, "vision_token_id": 7}
    (copy / "config.json").write_text(json.dumps(config))
    load_student(copy)
