"""Soft caps, learned sinks and sliding windows, in models that have them, against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from students_support import (
    checkpoint_layers,
    eager_attention,
    full_precision_softmax,
    gradients,
    pick,
    restore,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mekernels import use_backend
from motionenhancer.students import capture_attention
from motionenhancer.students.attention_registry import ObservedCall
from motionenhancer.students.entries import ForwardEntries

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LAYERS = ["full_attention", "sliding_attention", "full_attention"]


def sharp(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.normal_(0, 1.5)
            if "sinks" in name:
                parameter.normal_(1, 2)
    return model.double().eval()


def gemma2(**options: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    cap = {"attn_logit_softcapping": 3.0, "sliding_window": 4, "layer_types": LAYERS}
    config = Gemma2Config(**SIZES, **{**cap, "query_pre_attn_scalar": 8, **options})
    return sharp(Gemma2ForCausalLM._from_config(config, attn_implementation="eager"))


def gpt_oss(**options: Any) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "layer_types": LAYERS}
    config = GptOssConfig(**SIZES, **{**experts, **options})
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")  # the grouped one has no double precision
    return sharp(model)


def drawn(n: int = 11) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A left-padded batch, rows and columns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (2, n), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    rows = torch.tensor([[n - 1, 4, 7], [n - 2, 6, -1]])
    columns = torch.cat([torch.arange(n).repeat(2, 1), torch.tensor([[-1], [-1]])], 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}, rows, columns


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_values_and_gradients(make: Any, backend: str, use_checkpoints: bool) -> None:
    """Layers read together and layer by layer; sinks have a gradient of their own."""
    model = make()
    batch, rows, columns = drawn()
    expected, out = eager_attention(model, batch, rows, columns)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = gradients(model, (expected * weight).sum() + out.loss)
    if use_checkpoints:
        checkpoint_layers(model)
    with use_backend(backend), full_precision_softmax():
        with capture_attention(model, rows, columns, layers="all") as captured:
            out = model(**batch)
        found = gradients(model, (captured.attention * weight).sum() + out.loss)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    largest = max(float(g.abs().max()) for g in reference.values())
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12 * largest, msg=name)


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_head_by_head(make: Any) -> None:
    model = make()
    batch, rows, columns = drawn()
    with full_precision_softmax(), torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions, 1)[:, :, [1, 2]]
        with capture_attention(model, rows, columns, layers="all", heads=[2, 1], reduce="none") as captured:
            model(**batch)
        with capture_attention(model, rows, columns, heads=[2, 1]) as mean:
            model(**batch)
    for sample in range(2):
        expected = maps[sample][:, :, rows[sample].clamp(min=0)][..., columns[sample].clamp(min=0)]
        expected = expected * (rows[sample] >= 0)[:, None] * (columns[sample] >= 0)
        torch.testing.assert_close(captured.attention[sample], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mean.attention[sample], expected[[0, 2]].mean((0, 1)), rtol=1e-9, atol=0)
    assert mean.left_out == 1


def flash_stand_in(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Any:
    """Flash attention without padding, in plain torch."""
    repeat, keys = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    position = torch.arange(keys)
    away = position[keys - query.shape[2] :, None] - position
    seen = (away >= 0) & (away < (sliding_window or keys))
    scores = query @ key.mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_flash_attention_with_windows(reduce: str) -> None:
    """Layers without a mask that differ in their window alone. The kernel is a stand-in."""
    model = gemma2()
    batch, rows, columns = drawn()
    del batch["attention_mask"]
    with full_precision_softmax(), torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions, 1)
    each = torch.stack([pick(m, rows, columns) for m in maps.flatten(1, 2).unbind(1)], 1)
    expected = each.mean(1) if reduce == "mean" else each.unflatten(1, maps.shape[1:3])
    model.config._attn_implementation_internal = "flash_attention_2"
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash_stand_in
    try:
        with capture_attention(model, rows, columns, layers="all", reduce=reduce) as captured:
            model(**batch)
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("make", "option"), [(gemma2, "softcap"), (gpt_oss, "s_aux")])
def test_an_attention_that_drops_them_is_refused(make: Any, option: str) -> None:
    """Torch's attention has neither soft caps nor sinks, so its map would be wrong."""
    model = make()
    batch, rows, columns = drawn()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "sdpa"
    with (
        capture_attention(model, rows, columns),
        pytest.raises(ValueError, match=f"sdpa does not know the {option} of"),
    ):
        model(**batch)
    restore(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [None, [1]])
@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_sinks_beside_any_mask(bias: bool, heads: list[int] | None, reduce: str, cap: float | None) -> None:
    """Without a scale, with a mask for each head, and with a row that sees only its sink."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator)
    key = torch.randn(1, 1, 5, 4, dtype=torch.float64, generator=generator)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    mask = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.4, float("-inf"))
    mask[:, :, 2] = float("-inf")
    if bias:
        mask = mask + torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    scores = query @ key.mT / 2
    scores = (scores if cap is None else cap * (scores / cap).tanh()) + mask
    whole = torch.cat([scores, sinks[:, None, None].expand(1, 2, 5, 1)], -1).softmax(-1)[..., :-1]
    whole = whole if heads is None else whole[:, heads]
    entries = ForwardEntries(torch.arange(5)[None], slice(0, 5), 1, heads, reduce)
    options = {"s_aux": sinks, "softcap": cap}
    entries.read(ObservedCall("eager", torch.nn.Identity(), query, key, mask, options))
    expected = whole.mean(1) if reduce == "mean" else whole[:, None]
    torch.testing.assert_close(entries.attention, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (found,) = torch.autograd.grad((entries.attention * weight).sum(), sinks)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), sinks)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_sinks_under_flash_attention() -> None:
    """Flash attention's mask has the padding only; its rows are causal by an option."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, generator=generator)
    mask, sinks = torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([0.5, -1.0], dtype=torch.float64)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & mask.bool()
    scores = (query @ key.mT / 2).masked_fill(~seen, float("-inf"))
    whole = torch.cat([scores, sinks[:, None, None].expand(1, 2, 5, 1)], -1).softmax(-1)[..., :-1]
    entries = ForwardEntries(torch.arange(5)[None], slice(0, 5), 1, None, "none")
    entries.read(ObservedCall("flash_attention_2", torch.nn.Identity(), query, key, mask, {"s_aux": sinks}))
    torch.testing.assert_close(entries.attention[:, 0], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_in_half_precision_err_no_more_than_eager(dtype: torch.dtype) -> None:
    """Both errors are against double precision, on the maps of one layer."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 40, 24, generator=generator).to(dtype) for _ in range(2))
    sinks = torch.tensor([1.7, -0.3]).to(dtype)
    last = sinks[:, None, None].expand(2, 2, 40, 1)
    exact = torch.cat([query.double() @ key.double().mT * 24**-0.5, last.double()], -1).softmax(-1)[..., :-1]
    plain = torch.cat([query @ key.mT * 24**-0.5, last], -1).float().softmax(-1).to(dtype)[..., :-1]
    entries = ForwardEntries(torch.arange(40).repeat(2, 1), slice(0, 40), 1, None, "none")
    entries.read(ObservedCall("eager", torch.nn.Identity(), query, key, None, {"s_aux": sinks}))
    error = (entries.attention[:, 0].double() - exact).abs()
    allowed = (plain.double() - exact).abs()
    assert float(error.max()) <= 2 * float(allowed.max())
    assert float(error.mean()) <= 2 * float(allowed.mean())
