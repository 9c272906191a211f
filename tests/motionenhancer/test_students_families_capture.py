"""Every family of students: captured attention as its eager one's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import VISION, batch_of
from students_support import (
    TEXTS,
    checkpoint_layers,
    clip,
    dialogue,
    eager_attention,
    full_precision_modules,
    full_precision_softmax,
    gradients,
    pick,
    random_rows,
    restore,
)
from tiny_students import SAVE, tiny_student

from motionenhancer.students import capture_attention
from motionenhancer.students.locate import text_model

#: Layers with windows are read too; other tests cover the default.
capture = partial(capture_attention, layers="all")


@pytest.fixture(scope="module", params=list(SAVE))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_student(request.param, tmp_path_factory.mktemp("students") / request.param)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest, msg=name)


@full_precision_modules()
@pytest.mark.parametrize(("side", "use_checkpoints"), [("right", False), ("left", True)])
def test_captured_attention_is_eagers(student: Any, side: str, use_checkpoints: bool) -> None:
    model = student[0]
    batch, layouts, _ = batch_of(student, side)
    seed = 2 * use_checkpoints + (side == "left")
    rows, columns = random_rows(batch, 6, seed)
    columns = torch.cat([columns, torch.stack([layout_positions(layout, 12) for layout in layouts])], 1)
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        reference = gradients(model, (expected * weight).sum() + out.loss)
        assert any(student[2].in_vision_tower(name) for name in reference)
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture(model, rows, columns) as captured:
                out = model(**batch)
            found = gradients(model, (captured.attention * weight).sum() + out.loss)
    finally:
        restore(model)
    assert float(captured.attention.detach().std()) > 1e-3
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    assert_same_gradients(found, reference)


def layout_positions(layout: Any, count: int) -> torch.Tensor:
    """The first vision tokens of a sample, -1 where it has none."""
    chosen = torch.full((count,), -1)
    if layout.videos:
        chosen[:] = layout.videos[0].positions[:count]
    return chosen


@full_precision_modules()
def test_captured_attention_of_lora(student: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, processor, family = tiny_student(student[0].config.model_type, tmp_path / "student")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=r".*(language|text)_model.*\.[qkv]_proj", init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config).to(torch.float64)
    batch, _, _ = batch_of((model, processor, family))
    rows, columns = random_rows(batch, 5)
    expected, out = eager_attention(wrapped.get_base_model(), batch, rows, columns)
    reference = gradients(wrapped, expected.square().sum() + out.loss)
    assert reference
    assert all("lora_" in name for name in reference)
    for use_checkpoints in (False, True):
        if use_checkpoints:
            wrapped.get_base_model().enable_input_require_grads()
            checkpoint_layers(wrapped.get_base_model())
        with full_precision_softmax():
            with capture(wrapped, rows, columns) as captured:
                out = wrapped(**batch)
            found = gradients(wrapped, captured.attention.square().sum() + out.loss)
        torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
        assert_same_gradients(found, reference)


def double(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if k in VISION else v for k, v in batch.items()}


def packed(student: Any) -> Any:
    """Two samples with a video each in one row, told apart by positions; the batches of each alone."""
    model, processor, family = student
    samples = [family.encode(processor, dialogue(*TEXTS[i]), [clip(4, 32, 48, seed=i)]) for i in range(2)]
    singles, positions = [], []
    for sample in samples:
        single = double(family.collate([sample], pad_token_id=0))
        del single["layouts"], single["attention_mask"]
        seen: list[torch.Tensor] = []
        handle = text_model(model).register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**single)
        handle.remove()
        length = single["input_ids"].shape[1]
        own = torch.arange(length)[None]
        # What the model computes where nothing is given; 3-D positions go with those that tell samples apart.
        spatial = seen[0] if seen[0] is not None and seen[0].dim() == 3 else None
        if spatial is not None:
            positions.append(torch.cat([own[None], spatial[-3:]]))
        else:
            positions.append(own)
        singles.append(single)
    # The label of a sample's first token is left out: it would be predicted from the sample before.
    for single in singles:
        single["labels"][0, 0] = -100
    batch = double(family.collate(samples, pad_token_id=0))
    batch = {name: batch[name] for name in samples[0].vision_inputs}
    batch |= {n: torch.cat([s[n] for s in singles], 1) for n in singles[0] if n not in batch}
    batch |= {"position_ids": torch.cat(positions, -1), "use_cache": False}
    return batch, singles


@full_precision_modules()
@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_packed_samples(student: Any, use_checkpoints: bool) -> None:
    """Values and gradients equal those of eager attention, and those of each sample alone."""
    model = student[0]
    if student[2].name in ("qwen3_5", "minicpmv4_6", "minicpmv4_7"):
        pytest.skip("linear attention runs over the bounds of packed samples")
    batch, singles = packed(student)
    lengths = [single["input_ids"].shape[1] for single in singles]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(total, (1, 9), generator=generator)
    rows[0, 0], rows[0, 1] = lengths[0], -1
    columns = torch.arange(total)[None]
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        reference = gradients(model, (expected * weight).sum() + out.loss)
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture(model, rows, columns) as captured:
                out = model(**batch)
            found = gradients(model, (captured.attention * weight).sum() + out.loss)
        blocks = []
        for single, length in zip(singles, lengths, strict=True):
            with capture(model, torch.arange(length)[None], slice(0, length)) as alone:
                model(**single)
            blocks.append(alone.attention[0])
    finally:
        restore(model)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    assert_same_gradients(found, reference)
    apart = pick(torch.block_diag(*blocks)[None], rows, columns)
    torch.testing.assert_close(captured.attention, apart, rtol=1e-6, atol=1e-8)


def test_compiled_student(tmp_path: Path) -> None:
    """With padded texts only: compiling a vision tower takes minutes, and a tower is not captured here."""
    model, processor, family = tiny_student("qwen3_vl", tmp_path)
    samples = [family.encode(processor, dialogue(*TEXTS[i], videos=0), []) for i in (0, 2)]
    batch = family.collate(samples, pad_token_id=processor.tokenizer.pad_token_id, padding_side="left")
    del batch["layouts"]
    batch["use_cache"] = False
    rows, columns = random_rows(batch, 6)
    torch._dynamo.reset()
    model.train()
    try:
        expected, out = eager_attention(model, batch, rows, columns)
        reference = gradients(model, expected.square().sum() + out.loss)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            with full_precision_softmax(), capture(compiled, rows, columns) as captured:
                out = compiled(**batch)
            torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
            found = gradients(model, captured.attention.square().sum() + out.loss)
            assert_same_gradients(found, reference)
    finally:
        restore(model)
        torch._dynamo.reset()


def test_vision_tower_by_name(student: Any) -> None:
    model, _, family = student
    tower = {n for n, _ in model.named_parameters() if family.in_vision_tower(n)}
    assert tower
    for name in tower:
        assert "language_model" not in name
        assert "lm_head" not in name
        assert "projector" not in name
        assert ".merger" not in name
    rest = {n for n, _ in model.named_parameters()} - tower
    kept = ("language_model", "text_model", "lm_head", "projector", "merger", "image_newline", "connector")
    kept += ("embed_vision", "vision_resampler")
    assert all(any(part in n for part in kept) for n in rest)
