"""Attention of vision towers against that of their own eager functions: packed by parts, windowed, plain."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from students_support import (
    TEXTS,
    checkpoint_layers,
    clip,
    dialogue,
    full_precision_softmax,
    gradients,
    make_batch,
    pick,
    restore,
    sharp_student,
)
from tiny_students import SAVE, tiny_student
from torch import nn

from motionenhancer.students import capture_attention
from motionenhancer.students.locate import named_attention

TOWERS = ("model.visual", "model.vision_tower", "model.vision_model", "model.video_tower")


def sharpen(model: Any, tower: str) -> None:
    with torch.no_grad():
        for module in named_attention(model, tower):
            for name, parameter in module.named_parameters():
                if name.endswith("weight") and any(part in name for part in ("q", "k")):
                    parameter *= 4


@pytest.fixture(scope="module", params=["qwen2_5_vl", *SAVE])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, the name of its tower, its layers that attend to one sequence, and a batch with one video."""
    if request.param == "qwen2_5_vl":
        model, processor = sharp_student(dtype=torch.float64)
        batch, _ = make_batch(processor, samples=2, dtype=torch.float64)
    else:
        folder = tmp_path_factory.mktemp("students") / request.param
        model, processor, family = tiny_student(request.param, folder)
        encoded = family.encode(processor, dialogue(*TEXTS[0]), [clip(4, 32, 48)])
        batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
        del batch["layouts"]
        batch = {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}
    tower = next(name for name in TOWERS if name in dict(model.named_modules()))
    sharpen(model, tower)
    return model, tower, [0] if request.param == "minicpmv4_6" else None, batch


@contextlib.contextmanager
def eager_maps(modules: list[nn.Module]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """The weights that each call of each module's eager attention returns."""
    found: dict[int, list[torch.Tensor]] = {id(module): [] for module in modules}
    namespace = inspect.unwrap(type(modules[0]).forward).__globals__
    original = namespace["eager_attention_forward"]

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(module, *args, **kwargs)
        if id(module) in found:
            found[id(module)].append(out[1])
        return out

    with pytest.MonkeyPatch.context() as patch, full_precision_softmax():
        patch.setitem(namespace, "eager_attention_forward", spy)
        yield found


def whole(parts: list[torch.Tensor]) -> torch.Tensor:
    """(B, H, N, N) of what is one call, or one of each part."""
    if len(parts) == 1:
        return parts[0]
    heads = range(parts[0].shape[1])
    return torch.stack([torch.block_diag(*[part[0, head] for part in parts]) for head in heads])[None]


def reference(model: Any, tower: str, layers: list[int] | None, batch: dict[str, Any]) -> Any:
    """(B, L, H, N, N) of eager attention, and the model's output."""
    modules = named_attention(model, tower)
    modules = modules if layers is None else [modules[layer] for layer in layers]
    model.set_attn_implementation("eager")
    try:
        with eager_maps(modules) as found:
            out = model(**batch)
    finally:
        model.set_attn_implementation("sdpa")
    return torch.stack([whole(found[id(module)]) for module in modules], 1), out


@pytest.mark.parametrize(("implementation", "use_checkpoints"), [("sdpa", False), ("eager", True)])
def test_values_and_gradients(student: Any, implementation: str, use_checkpoints: bool) -> None:
    model, tower, layers, batch = student
    capture = partial(capture_attention, model, layers=layers, module=tower)
    try:
        maps, out = reference(model, tower, layers, batch)
        generator = torch.Generator().manual_seed(0)
        samples, length = maps.shape[0], maps.shape[-1]
        rows = torch.randint(length, (samples, 7), generator=generator)
        columns = torch.randint(length, (samples, 40), generator=generator)
        rows[-1, 2] = columns[0, 5] = -1
        each = torch.stack([pick(m, rows, columns) for m in maps.flatten(1, 2).unbind(1)], 1)
        expected = each.mean(1)
        assert float(expected.std()) > 1e-3
        loss = expected.square().sum() + out.logits.square().mean()
        wanted = gradients(model, loss)
        assert any(name.startswith(tower) for name in wanted)
        model.set_attn_implementation(implementation)
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture(rows, columns) as captured:
                out = model(**batch)
            found = gradients(model, captured.attention.square().sum() + out.logits.square().mean())
            with capture(rows, columns, heads=[1], reduce="none") as apart:
                model(**batch)
    finally:
        restore(model)
    assert captured.layers == maps.shape[1]
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        apart.attention[:, :, 0], each.unflatten(1, maps.shape[1:3])[:, :, 1], rtol=1e-9, atol=1e-12
    )
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12 * largest, msg=name)
