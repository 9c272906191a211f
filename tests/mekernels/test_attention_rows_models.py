"""Attention rows next to real transformers models against their own ``output_attentions=True``.

The hook here is what anyone could write who installs only mekernels: it reads queries and keys where the
model hands them to its attention function.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from kernel_support import assert_exact

import mekernels

transformers = pytest.importorskip("transformers")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), {}


def qwen():
    from motionenhancer.toy.models import make_student

    model, _ = make_student(layers=2, heads=4, key_value_heads=2)
    pixels = torch.randn(64, 3 * 2 * 4 * 4, dtype=torch.float64)
    return model, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}


def internvl():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "qwen2"}, image_token_id=63
    )
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return transformers.InternVLForConditionalGeneration(config), {"pixel_values": pixels}


def prepare(build, implementation):
    torch.manual_seed(0)
    model, images = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    model = model.double().eval()
    model.set_attn_implementation(implementation)
    language = getattr(model.model, "language_model", model.model)
    return model, images, [layer.self_attn for layer in language.layers]


@contextmanager
def observed(modules, read):
    """Call ``read(query, key)`` next to the sdpa attention of some modules."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, **options):
        if any(module is one for one in modules):
            read(query, key, options["scaling"])
        return original(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the instance's own entry; the class keeps the original


@contextmanager
def double_softmax(monkeypatch):
    """Eager attention takes its softmax in float32; here it keeps the model's float64."""
    original = torch.nn.functional.softmax
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: original(x, dim=dim))
        yield


def tokens(model, images, length):
    """Two samples, the second padded on the left by three tokens, each with its image."""
    ids = torch.randint(1, 60, (2, length))
    if "image_grid_thw" in images:
        ids[:, 4:20] = model.config.image_token_id
        images = {
            "pixel_values": images["pixel_values"].repeat(2, 1),
            "image_grid_thw": images["image_grid_thw"].repeat(2, 1),
        }
    elif images:
        ids[:, 4:8] = model.config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, **images}


def picked(attentions, rows, columns):
    """Mean over layers and heads of whole maps, at the rows and columns."""
    mean = torch.stack(attentions).mean((0, 2))
    chosen = mean.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, mean.shape[2]))
    chosen = chosen.gather(2, columns.clamp(min=0)[:, None].expand(-1, rows.shape[1], -1))
    return chosen * (rows >= 0)[..., None] * (columns >= 0)[:, None]


def gradients(value, model):
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view_as(value)
    parameters = [p for name, p in model.named_parameters() if "language_model" in name or "layers" in name]
    found = torch.autograd.grad((value * weights).sum(), parameters, allow_unused=True)
    return [item for item in found if item is not None]


def same(model, modules, inputs, rows, columns, monkeypatch, **options):
    """Values and gradients of the fast and of the eager path agree."""
    seen = []

    def read(query, key, scale):
        seen.append(
            mekernels.attention_rows(query, key, rows, columns, softmax_scale=scale, causal=True, **options)
        )

    with observed(modules, read):
        model(**inputs)
    assert len(seen) == len(modules)
    actual = torch.stack(seen).mean(0)
    model.set_attn_implementation("eager")
    with double_softmax(monkeypatch):
        expected = picked(model(**inputs, output_attentions=True).attentions, rows, columns)
    assert_exact(actual, expected, 1e-11)
    assert actual.std() > 1e-3
    found, wanted = gradients(actual, model), gradients(expected, model)
    assert len(found) == len(wanted) > 5
    for one, other in zip(found, wanted, strict=True):
        assert_exact(one, other, 1e-9)


@pytest.mark.parametrize("build", [llama, qwen, internvl])
def test_padded_batches(build, monkeypatch):
    model, images, modules = prepare(build, "sdpa")
    inputs = tokens(model, images, 32)
    rows = torch.tensor([[31, 25, 25, -1], [30, 22, 3, 31]])
    columns = torch.tensor([[4, 5, 7, 11, -1], [19, 3, 4, 6, 30]])
    same(model, modules, inputs, rows, columns, monkeypatch, key_mask=inputs["attention_mask"].bool())


@pytest.mark.parametrize("build", [llama])
def test_packed_sequences(build, monkeypatch):
    model, _, modules = prepare(build, "sdpa")
    lengths = [9, 1, 14, 8]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    inputs = {"input_ids": torch.randint(1, 60, (1, 32)), "position_ids": position, "use_cache": False}
    rows, columns = torch.tensor([[31, 9, 8, 20, -1, 10]]), torch.tensor([[0, 3, 9, 10, 15, 20, 25, 31]])
    same(model, modules, inputs, rows, columns, monkeypatch, cu_seqlens=ends)
    # Without the limits the rows would see the sequences before their own.
    model.set_attn_implementation("sdpa")
    with pytest.raises(AssertionError):
        same(model, modules, inputs, rows, columns, monkeypatch)


def test_sinks_and_windows_of_gpt_oss(monkeypatch):
    """The model's eager attention counts a sink of each head, and every second layer has a window."""
    from transformers.models.gpt_oss import modeling_gpt_oss

    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}
    config = transformers.GptOssConfig(
        **TEXT, **experts, attn_implementation="eager", experts_implementation="eager"
    )
    model = transformers.GptOssForCausalLM(config).double().eval()
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    with torch.no_grad():
        for place, sink in enumerate(sinks):
            sink.copy_(torch.linspace(-1, 2, 6) + place)
    rows, columns, seen = torch.tensor([[15, 3, 9]]), slice(0, 12), []
    original = modeling_gpt_oss.eager_attention_forward

    def attention(module, query, key, *arguments, **options):
        window = (4, -1) if module.sliding_window else None
        given = {"softmax_scale": options["scaling"], "causal": True, "window": window}
        read = mekernels.attention_rows(query, key, rows, columns, sinks=module.sinks, reduce="none", **given)
        lse = mekernels.attention_lse(query, key, sinks=module.sinks, **given)
        whole = mekernels.attention_columns(query, key, lse, columns, reduce="none", **given)
        seen.append((module.sliding_window, read, whole))
        return original(module, query, key, *arguments, **options)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", attention)
    with double_softmax(monkeypatch):
        maps = model(torch.randint(1, 60, (1, 16)), output_attentions=True, use_cache=False).attentions
    assert {bool(window) for window, *_ in seen} == {True, False}
    for sink, one, (_, read, whole) in zip(sinks, maps, seen, strict=True):
        assert (one.sum(-1) < 0.95).all()
        for found, wanted in ((read, one[:, :, rows[0], columns]), (whole, one[..., columns])):
            assert_exact(found, wanted, 1e-11)
            weights = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view_as(found)
            grads = [
                torch.autograd.grad((item * weights).sum(), sink, retain_graph=True)[0]
                for item in (found, wanted)
            ]
            assert_exact(*grads, 1e-11)
