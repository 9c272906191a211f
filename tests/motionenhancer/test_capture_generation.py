"""The attention of generated words, step by step, against what eager attention returns while generating."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from students_support import full_precision_softmax, make_batch, restore, sharp_student
from test_capture_scores import SIZES, drawn, gemma2, gpt_oss, sharp
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motionenhancer.students import capture_attention
from motionenhancer.students.attention_registry import ObservedCall
from motionenhancer.students.entries import ForwardEntries

WORDS = 6


def generated(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    with full_precision_softmax():
        return model.generate(
            **{name: value for name, value in batch.items() if name not in ("labels", "use_cache")},
            **{"do_sample": False, "max_new_tokens": WORDS, "min_new_tokens": WORDS, **options},
            return_dict_in_generate=True,
        )


def eager_rows(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """(B, L, H, steps, N + steps - 1): the last row of every step, with zeros for keys that came later."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = generated(model, batch, output_attentions=True, **options)
    finally:
        model.set_attn_implementation(before)
    total = batch["input_ids"].shape[1] + WORDS - 1
    samples, heads = out.attentions[0][0].shape[:2]
    maps = torch.zeros(samples, len(out.attentions[0]), heads, WORDS, total, dtype=torch.float64)
    for step, layers in enumerate(out.attentions):
        end = total - WORDS + 1 + step
        for layer, given in enumerate(layers):
            # A sliding window's cache holds the latest keys; a static one has room for those to come.
            row = given[:, :, -1, :end]
            maps[:, layer, :, step, end - row.shape[-1] : end] = row
    return maps, out.sequences


@pytest.fixture(scope="module")
def student() -> Any:
    return sharp_student(dtype=torch.float64)


@pytest.fixture
def model(student: Any) -> Any:
    student[0].model.rope_deltas = None  # left by the previous batch
    yield student[0]
    restore(student[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_words_about_a_video(model: Any, student: Any, implementation: str, cache: str) -> None:
    """A batch that is padded on the left, in every layer and head, and the mean."""
    batch, layouts = make_batch(student[1], samples=3, side="left", dtype=torch.float64)
    video = [layout.videos[0].positions for layout in layouts]
    columns = torch.nn.utils.rnn.pad_sequence(video, batch_first=True, padding_value=-1)
    # Columns may also be words of the answer: later words see them, earlier words do not.
    n = batch["input_ids"].shape[1]
    columns = torch.cat([columns, torch.arange(n - 2, n + WORDS - 1).repeat(3, 1)], 1)
    expected, sequences = eager_rows(model, batch, cache_implementation=cache)
    index = columns.clamp(min=0)[:, None, None, None].expand(*expected.shape[:-1], -1)
    expected = expected.gather(-1, index) * (columns >= 0)[:, None, None, None]
    model.set_attn_implementation(implementation)
    with capture_attention(model, None, columns, reduce="none") as captured:
        out = generated(model, batch, cache_implementation=cache)
    with capture_attention(model, None, columns, layers=[2, 0], heads=[3, 1]) as mean:
        generated(model, batch, cache_implementation=cache)
    assert torch.equal(out.sequences, sequences)
    torch.testing.assert_close(captured.attention, expected, rtol=1e-9, atol=1e-12)
    wanted = expected[:, [0, 2]][:, :, [1, 3]].mean((1, 2))
    torch.testing.assert_close(mean.attention, wanted, rtol=1e-9, atol=1e-12)
    assert float(expected[:, 1].std()) > 1e-3


def mistral() -> Any:
    """A model with a window in every layer, which no attribute of a layer shows."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return sharp(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))


@pytest.mark.parametrize("make", [gemma2, gpt_oss, mistral])
@pytest.mark.parametrize("columns", [slice(0, 11), slice(2, 16), slice(12, 14)])
def test_windows_that_drop_keys(make: Any, columns: slice) -> None:
    """A sliding-window cache drops keys, but positions still count in the whole sequence."""
    model = make()
    batch, _, _ = drawn()
    expected, _ = eager_rows(model, batch)
    with capture_attention(model, None, columns, layers="all", reduce="none") as captured:
        generated(model, batch)
    torch.testing.assert_close(captured.attention, expected[..., columns], rtol=1e-9, atol=1e-12)


def test_caches_of_two_lengths_without_a_mask() -> None:
    """Only the number of keys distinguishes such layers."""
    query = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    modules = torch.nn.Identity(), torch.nn.Identity()
    modules[1].layer_type = "chunked_attention"
    entries = ForwardEntries(torch.tensor([[0]]), slice(1, 6), 2, None, "none", tokens=6)
    expected = torch.zeros(1, 2, 2, 1, 6, dtype=torch.float64)
    for layer, keys in enumerate((6, 4)):
        key = torch.randn(1, 2, keys, 4, dtype=torch.float64)
        expected[:, layer, :, :, 6 - keys :] = (query @ key.mT / 2).softmax(-1)
        call = ObservedCall("sdpa", modules[layer], query, key, None, {})
        entries.check(call)
        entries.read(call)
    torch.testing.assert_close(entries.attention, expected[..., 1:])


def test_no_step_keeps_its_mask(model: Any) -> None:
    """Otherwise a thousand generated words would keep a thousand masks."""
    batch, _, _ = drawn()
    masks = []

    def own(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        masks.append(weakref.ref(mask))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with capture_attention(model, None, slice(0, 5)) as captured:
            generated(model, batch)
            assert captured.attention.shape == (2, WORDS, 5)
            assert len(masks) == 3 * WORDS
            assert not any(mask() is not None for mask in masks)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_beams_and_samples(model: Any) -> None:
    """The rows belong to the running sequences: one for each beam, in the order of the step."""
    ids = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 2, "do_sample": True}
    expected, _ = eager_rows(model, {"input_ids": ids}, **options)
    with capture_attention(model, None, slice(0, 7), reduce="none") as captured:
        generated(model, {"input_ids": ids}, **options)
    assert captured.attention.shape == (4, 3, 4, WORDS, 7)
    torch.testing.assert_close(captured.attention, expected[..., :7], rtol=1e-9, atol=1e-12)


def test_step_by_step_with_gradients(model: Any) -> None:
    """A custom loop that starts with earlier tokens; the rows so far can be read after every step."""
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("eager")
    with full_precision_softmax():
        whole = torch.stack(model(input_ids=ids, output_attentions=True).attentions).mean((0, 2))
    restore(model)
    (weight,) = [
        p for name, p in model.named_parameters() if name.endswith("layers.0.self_attn.q_proj.weight")
    ]
    (reference,) = torch.autograd.grad(whole[:, 5:].square().sum(), weight)
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with full_precision_softmax(), capture_attention(model, None, slice(0, 9)) as captured:
        for step, part in enumerate([ids[:, 3:6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:9]]):
            cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
            read = captured.attention
            assert read.shape == (2, step + 1, 9)
            torch.testing.assert_close(read, whole[:, 5 : 6 + step], rtol=1e-9, atol=1e-12)
    (found,) = torch.autograd.grad(captured.attention.square().sum(), weight)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


def test_refused(model: Any) -> None:
    ids = torch.arange(7)[None]
    with capture_attention(model, None, torch.tensor([[1], [2]])), pytest.raises(ValueError, match="columns"):
        model(input_ids=ids)
    with capture_attention(model, None, slice(0, 2)) as captured:
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 tokens followed the first forward"):
            model(input_ids=ids[:, 2:5], past_key_values=cache)
    with pytest.raises(RuntimeError, match="0 of the 3 attention layers"):
        _ = captured.attention


def test_caches_whose_positions_are_unknown(model: Any) -> None:
    batch, _, _ = drawn()
    windowed = gemma2()
    with (
        capture_attention(windowed, None, slice(0, 2), layers="all"),
        pytest.raises(
            ValueError, match="sliding-window cache of Gemma2Attention holds 4 keys for the first 2"
        ),
    ):
        generated(windowed, {"input_ids": batch["input_ids"][:, :2]}, cache_implementation="static")
    with capture_attention(model, None, slice(0, 2)):
        cache = model(input_ids=torch.arange(4)[None], use_cache=True).past_key_values
        cache.crop(-1)
        with pytest.raises(ValueError, match="holds 4 of 5 tokens, so the positions of its keys are unknown"):
            model(input_ids=torch.arange(1)[None], past_key_values=cache)
