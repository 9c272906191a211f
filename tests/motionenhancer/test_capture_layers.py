"""The layers and heads that are read, together and separately."""

from __future__ import annotations

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
    random_rows,
    restore,
    sharp_student,
)
from tiny_students import tiny_student

from motionenhancer.alignment.aligner import align
from motionenhancer.students import capture_attention
from motionenhancer.students.locate import layers_read


def eager_maps(model: Any, batch: dict[str, Any], rows: torch.Tensor, columns: torch.Tensor) -> Any:
    """(B, L, H, R, C) of transformers' own ``output_attentions``, and the model's output."""
    model.set_attn_implementation("eager")
    try:
        with full_precision_softmax():
            out = model(**batch, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    maps = torch.stack(out.attentions, 1)
    shape = maps.shape[1:3]
    picked = [pick(m, rows, columns) for m in maps.flatten(1, 2).unbind(1)]
    return torch.stack(picked, 1).unflatten(1, shape), out


@pytest.fixture(scope="module")
def student() -> Any:
    return sharp_student(dtype=torch.float64)


@pytest.mark.parametrize("use_checkpoints", [False, True])
@pytest.mark.parametrize("layers", [None, [0, 2], [1], "all"])
@pytest.mark.parametrize("heads", [None, [3, 1]])
def test_chosen_layers_and_heads(student: Any, layers: Any, heads: Any, use_checkpoints: bool) -> None:
    model, processor = student
    batch, _ = make_batch(processor, samples=2, side="left", dtype=torch.float64)
    rows, columns = random_rows(batch, 6, 3)
    expected, out = eager_maps(model, batch, rows, columns)
    expected = expected[:, [0, 1, 2] if layers in (None, "all") else layers]
    expected = expected if heads is None else expected[:, :, sorted(heads)]
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = gradients(model, (expected * weight).sum() + out.loss)
    try:
        if use_checkpoints:
            checkpoint_layers(model)
        with full_precision_softmax():
            with capture_attention(
                model, rows, columns, layers=layers, heads=heads, reduce="none"
            ) as captured:
                out = model(**batch)
            found = gradients(model, (captured.attention * weight).sum() + out.loss)
            with capture_attention(model, rows, columns, layers=layers, heads=heads) as mean:
                model(**batch)
    finally:
        restore(model)
    assert captured.layers == expected.shape[1]
    assert captured.left_out == 3 - expected.shape[1]
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean.attention, expected.mean((1, 2)), rtol=1e-9, atol=1e-12)
    largest = max(float(g.abs().max()) for g in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest, msg=name)


@pytest.mark.parametrize("mask_heads", [1, 4])
def test_masks_of_any_kind_head_by_head(student: Any, mask_heads: int) -> None:
    model, _ = student
    generator = torch.Generator().manual_seed(mask_heads)
    ids = torch.randint(300, (2, 9), generator=generator)
    allowed = torch.rand(2, mask_heads, 9, 9, generator=generator) < 0.5
    allowed |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(allowed.shape, dtype=torch.float64)
    additive.masked_fill_(~allowed, torch.finfo(torch.float64).min)
    rows, columns = torch.randint(9, (2, 5), generator=generator), torch.arange(9).repeat(2, 1)
    batch = {"input_ids": ids, "attention_mask": {"full_attention": additive}}
    expected, _ = eager_maps(model, batch, rows, columns)
    for heads in (None, [0, 3]):
        with capture_attention(model, rows, columns, heads=heads, reduce="none") as captured:
            model(**batch)
        wanted = expected if heads is None else expected[:, :, heads]
        torch.testing.assert_close(captured.attention, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "read", "left_out", "without"),
    [("gemma4", [1, 3], 2, 0), ("qwen3_5", [1, 3], 0, 2), ("minicpmv4_6", [1, 3], 0, 2)],
)
def test_layers_that_attend_globally_are_read(
    tmp_path: Any, name: str, read: list[int], left_out: int, without: int
) -> None:
    """Windows and linear attention are left out and counted; numbers count all layers of the model."""
    student = tiny_student(name, tmp_path)
    model = student[0]
    found = layers_read(model)
    assert [module.layer_idx for module in found.modules] == read
    assert (found.left_out, found.without) == (left_out, without)
    assert str(found).startswith("attention is read in 2 of 4 layers; 2 ")
    encoded = student[2].encode(student[1], dialogue(*TEXTS[0]), [clip(2, 16, 16)])
    batch = student[2].collate([encoded], pad_token_id=0)
    del batch["layouts"]
    batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    rows, columns = random_rows(batch, 5)
    maps, _ = eager_maps(model, batch, rows, columns)
    # For a hybrid model, eager attention returns maps of the attention layers only.
    expected = maps[:, read] if left_out else maps
    with full_precision_softmax(), capture_attention(model, rows, columns) as captured:
        model(**batch)
    torch.testing.assert_close(captured.attention, expected.mean((1, 2)), rtol=1e-9, atol=1e-12)
    with full_precision_softmax(), capture_attention(model, rows, columns, layers=read[1:]) as captured:
        model(**batch)
    torch.testing.assert_close(captured.attention, expected[:, 1].mean(1), rtol=1e-9, atol=1e-12)
    if left_out:
        with full_precision_softmax(), capture_attention(model, rows, columns, layers="all") as captured:
            model(**batch)
        assert (captured.layers, captured.left_out) == (4, 0)
        torch.testing.assert_close(captured.attention, maps.mean((1, 2)), rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(ValueError, match=r"layers must be different numbers of \[1, 3\], .*, got \[0\]"):
            layers_read(model, [0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [3]}, r"layers must be different numbers of \[0, 1, 2\], the layers with self-attention"),
        ({"layers": []}, "layers must be different"),
        ({"layers": [1, 1]}, "layers must be different"),
        ({"layers": "most"}, "layers must be numbers of layers, \"all\" or None, got 'most'"),
        ({"heads": []}, "heads must be different numbers"),
        ({"heads": [-1]}, "heads must be different numbers"),
        ({"heads": [4]}, "heads must be below the 4 of Qwen2_5_VLAttention, got 4"),
        ({"reduce": "sum"}, 'reduce must be "mean" or "none", got \'sum\''),
    ],
)
def test_refused_options(student: Any, options: dict[str, Any], says: str) -> None:
    model, _ = student
    with (
        pytest.raises(ValueError, match=says),
        capture_attention(model, torch.tensor([[1]]), slice(0, 1), **options),
    ):
        model(input_ids=torch.arange(4)[None])


@pytest.mark.parametrize("loss", ["l2", "squared", "mse", "kl"])
def test_the_loss_of_single_maps_is_their_mean(loss: str) -> None:
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 2, 4, 24, generator=generator)
    priors: Any = [
        SimpleNamespace(attention=torch.rand(4, 24, generator=generator), grid=(2, 3, 4)) for _ in range(2)
    ]
    found = align(maps, priors, loss=loss, weights=[0.5, 1.0], temperature=0.7)
    each = [
        align(maps[:, layer, head], priors, loss=loss, weights=[0.5, 1.0], temperature=0.7)
        for layer in range(3)
        for head in range(2)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean())
    assert float(torch.stack(each).std()) > 1e-2 * float(found)
