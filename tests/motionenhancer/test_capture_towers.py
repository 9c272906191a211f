"""Attention of vision towers against that of their own eager functions: packed by parts, windowed, plain."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motionenhancer.students import capture_attention
from motionenhancer.students.attention_registry import ObservedCall
from motionenhancer.students.keys import AttentionCall, read_mask
from motionenhancer.students.locate import named_attention
from motionenhancer.students.whole_layers import whole_layers

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
    return model, tower, [0] if request.param.startswith("minicpm") else None, batch


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
    """The map (B, H, N, N) from one call, or from one call for each part."""
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
                # Checkpointed layers run again while the capture lasts.
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


@pytest.fixture(scope="module")
def tower() -> Any:
    """Qwen2.5-VL, whose first layer attends by windows and whose second by frames; and a batch."""
    model, processor = sharp_student(dtype=torch.float64)
    batch, _ = make_batch(processor, samples=1, dtype=torch.float64)
    return model, batch


ROWS, COLUMNS = torch.tensor([[3, 90, 150, 191]]), slice(0, 192)


@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_flash_attention_packs_windows_and_frames(tower: Any, layers: list[int] | None) -> None:
    """One call a layer, with lengths that differ from layer to layer. The kernel is a stand-in."""
    model, batch = tower
    expected, _ = reference(model, "model.visual", layers, batch)
    expected = expected[0][:, :, ROWS[0]].mean((0, 1))[None]

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        starts = options["cu_seq_lens_q"]
        numbers = torch.searchsorted(starts.long(), torch.arange(query.shape[2]), right=True)
        seen = (numbers == numbers[:, None])[None, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2), None

    model.config.vision_config._attn_implementation_internal = "flash_attention_2"
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
    try:
        with capture_attention(model, ROWS, COLUMNS, layers=layers, module="model.visual") as captured:
            model(**batch)
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
        restore(model)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-6, atol=1e-9)
    # A window of 8 x 8 patches, a frame of 8 x 12.
    assert int((captured.attention[0, 0] > 0).sum()) == (64 if layers == [0] else 96)


def test_one_attention_by_its_name(tower: Any) -> None:
    model, batch = tower
    name = "model.visual.blocks.1.attn"
    expected, _ = reference(model, name, None, batch)
    with full_precision_softmax(), capture_attention(model, ROWS, COLUMNS, module=name) as captured:
        model(**batch)
    torch.testing.assert_close(captured.attention[0], expected[0, 0].mean(0)[ROWS[0]])
    # The capture has ended and left nothing behind.
    attention = model.get_submodule(name)
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


def test_images_and_videos_are_two_forwards_of_a_tower(tower: Any) -> None:
    model, batch = tower
    with capture_attention(model, ROWS, COLUMNS, module="model.visual", layers=[1]) as captured:
        for _ in range(2):
            model.model.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"])
    with pytest.raises(RuntimeError, match="ran more than once"):
        _ = captured.attention


def test_a_tower_that_fails(tower: Any) -> None:
    model, batch = tower
    block = model.model.visual.blocks[1]
    handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    with capture_attention(model, ROWS, COLUMNS, module="model.visual") as captured, pytest.raises(KeyError):
        model(**batch)
    handle.remove()
    with pytest.raises(RuntimeError, match="1 of the 2 attention layers to read"):
        _ = captured.attention


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"module": "model.visul"}, ValueError, r"got 'model.visul'; similar names: \['model.visual"),
        ({"module": "?"}, ValueError, r"got '\?'; similar names: \['model', 'lm_head'\]"),
        ({"module": ["model.visual"]}, TypeError, "module must be the name of a module, got list"),
        ({"module": "lm_head"}, ValueError, r"'lm_head' \(Linear\) holds none"),
        (
            {"module": "model.visual", "layers": [2]},
            ValueError,
            r"layers must be different numbers of \[0, 1\]",
        ),
        ({"module": "model.visual", "rows": None}, ValueError, "rows must be a tensor if module is given"),
        (
            {"module": "model.visual", "heads": [2]},
            ValueError,
            "heads must be below the 2 of Qwen2_5_VLVision",
        ),
        ({"module": "model.visual", "columns": slice(0, 193)}, ValueError, "below the 192 tokens, got 192"),
        (
            {"module": "model.visual", "rows": ROWS.repeat(2, 1)},
            ValueError,
            r"one entry per sample \(1\), got 2",
        ),
    ],
)
def test_refused(tower: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    model, batch = tower
    options = {"rows": ROWS, "columns": COLUMNS, **options}
    with pytest.raises(error, match=says), capture_attention(model, **options):
        model(**batch)


def test_compiled_layers(tower: Any) -> None:
    model, batch = tower
    with capture_attention(model, ROWS, COLUMNS, layers=[1], module="model.visual") as plain:
        out = model(**batch)
    block = model.model.visual.blocks[1]
    torch._dynamo.reset()
    block.compile(backend="eager")
    try:
        for _ in range(2):
            with capture_attention(model, ROWS, COLUMNS, layers=[1], module="model.visual") as captured:
                model(**batch)
            torch.testing.assert_close(captured.attention, plain.attention)
        torch.testing.assert_close(model(**batch).logits, out.logits)
    finally:
        block._compiled_call_impl = None


@pytest.mark.parametrize(
    ("batch", "mask", "causal", "says"),
    [
        (2, None, False, "Attending attends in 2 parts, which cannot be captured with a mask or a batch"),
        (
            1,
            torch.ones(1, 1, 3, 3),
            False,
            "Attending attends in 2 parts, which cannot be captured with a mask or a batch",
        ),
        (1, None, True, "Attending attends causally in parts: not supported"),
    ],
)
def test_parts_that_are_not_read(batch: int, mask: Any, causal: bool, says: str) -> None:
    query = torch.rand(batch, 2, 3, 4)

    class Attending(nn.Module):
        def forward(self, part: Any) -> None:
            for _ in range(2):
                part(ObservedCall("sdpa", self, query, query, mask, {"is_causal": causal}))

    module = Attending()

    def read(call: ObservedCall) -> Any:
        rows = torch.tensor([[0]])
        own = AttentionCall(call.module, call.mask, call.kwargs, rows, 2, 6, 6)
        return read_mask(call.implementation, own)

    with whole_layers([module], read) as part, pytest.raises(ValueError, match=says):
        module(part)


def test_a_forward_that_is_called_directly(tower: Any) -> None:
    model, _ = tower
    attention = model.model.visual.blocks[0].attn
    turn = torch.ones(8, 16, dtype=torch.float64)
    with (
        capture_attention(model, ROWS, COLUMNS, module="model.visual"),
        pytest.raises(ValueError, match="Qwen2_5_VLVisionAttention runs without its forward hooks"),
    ):
        attention.forward(torch.rand(8, 32).double(), torch.tensor([0, 8]), (turn, turn))


def test_cross_attention() -> None:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2}
    config = Idefics2Config(
        text_config={**sizes, "num_key_value_heads": 2, "vocab_size": 16, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 2, "hidden_size": 16},
        image_token_id=5,
    )
    model = Idefics2ForConditionalGeneration(config)
    with (
        capture_attention(model, torch.tensor([[0]]), slice(0, 1), module="model.connector"),
        pytest.raises(ValueError, match="Idefics2PerceiverAttention must attend to its own whole sequence"),
    ):
        model.model.get_image_features(torch.rand(1, 1, 3, 8, 8))


def test_layers_of_two_lengths(tmp_path: Any) -> None:
    """A tower may merge patches between layers; then a position has a different meaning in later layers."""
    model, processor, family = tiny_student("minicpmv4_6", tmp_path / "student")
    encoded = family.encode(processor, dialogue(*TEXTS[0]), [clip(2, 16, 16)])
    batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
    del batch["layouts"]
    batch = {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}
    with (
        capture_attention(model, torch.tensor([[0]]), slice(0, 1), module="model.vision_tower"),
        pytest.raises(ValueError, match=r"attends to \d+ tokens, a layer before it to \d+"),
    ):
        model(**batch)
