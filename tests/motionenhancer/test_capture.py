"""Captured attention against transformers' own eager attention with ``output_attentions``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from students_support import (
    assert_keeps_a_third,
    checkpoint_layers,
    eager_attention,
    full_precision_softmax,
    gradients,
    kept_numbers,
    make_batch,
    pick,
    random_rows,
    restore,
    sharp_student,
)
from torch.utils.checkpoint import checkpoint

from motionenhancer.students import capture_attention


@pytest.fixture(scope="module")
def student() -> Any:
    """A student in double precision, where two correct computations agree to many digits."""
    return sharp_student(dtype=torch.float64)


@pytest.fixture
def model(student: Any) -> Any:
    model = student[0]
    yield model
    restore(model)


@pytest.fixture(scope="module", params=["right", "left"])
def batch(request: pytest.FixtureRequest, student: Any) -> Any:
    return make_batch(student[1], samples=3, side=request.param, dtype=torch.float64)[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13 * largest, msg=name)


def weights(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_values_and_gradients(
    model: Any, batch: Any, implementation: str, seed: int, use_checkpoints: bool
) -> None:
    rows, columns = random_rows(batch, 5, seed)
    model.train()
    expected, out = eager_attention(model, batch, rows, columns)
    weight = weights(expected.shape, seed)
    reference = gradients(model, (expected * weight).sum() + out.loss)

    model.set_attn_implementation(implementation)
    if use_checkpoints:
        checkpoint_layers(model)
    with full_precision_softmax():
        with capture_attention(model, rows, columns) as captured:
            out = model(**batch)
        found = gradients(model, (captured.attention * weight).sum() + out.loss)
    assert captured.attention.dtype == torch.float64
    assert float(captured.attention.detach().std()) > 1e-3
    assert_same(captured.attention, expected)
    assert_same_gradients(found, reference)


@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_gradient_of_attention_alone(model: Any, batch: Any, use_checkpoints: bool) -> None:
    rows, columns = random_rows(batch, 4, 7)
    expected, _ = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum())
    if use_checkpoints:
        checkpoint_layers(model)
    with capture_attention(model, rows, columns) as captured:
        model(**batch)
    assert_same_gradients(gradients(model, captured.attention.square().sum()), reference)


def test_two_backwards_through_checkpoints(model: Any, batch: Any) -> None:
    """Loss and attention backpropagated one after the other recompute the layers twice."""
    rows, columns = random_rows(batch, 4, 3)
    expected, out = eager_attention(model, batch, rows, columns)
    out.loss.backward(retain_graph=True)
    expected.square().sum().backward()
    reference = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint_layers(model)
    with capture_attention(model, rows, columns) as captured:
        out = model(**batch)
        out.loss.backward(retain_graph=True)
        captured.attention.square().sum().backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, reference)
    model.zero_grad()
    assert_same(captured.attention, expected)


def test_slice_columns_and_vision_tower_unseen(model: Any, student: Any) -> None:
    batch, layouts = make_batch(student[1], samples=1, dtype=torch.float64)
    columns = layouts[0].videos[0].columns
    assert isinstance(columns, slice)
    rows = torch.tensor([[len(batch["input_ids"][0]) - 2, columns.stop + 1]])
    index = torch.arange(columns.start, columns.stop)[None]
    expected, _ = eager_attention(model, batch, rows, index)
    with capture_attention(model, rows, columns) as captured:
        model(**batch)
    assert captured.layers == model.config.text_config.num_hidden_layers
    assert_same(captured.attention, expected)


def test_unwatched_layers_run_as_always(model: Any, batch: Any) -> None:
    rows, columns = random_rows(batch, 3)
    plain = model(**batch)
    with capture_attention(model, rows, columns):
        watched = model(**batch)
    assert torch.equal(plain.logits, watched.logits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_sequences(model: Any, student: Any, seed: int) -> None:
    """Sequences in one row, told apart by position ids alone, equal the same sequences run one by one."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [5 + seed, 9, 4]
    ids = [torch.randint(300, (1, n), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(4, 1, -1)
    batch = {"input_ids": torch.cat(ids, 1), "position_ids": positions, "use_cache": False}
    total = sum(lengths)
    rows = torch.randint(total, (1, 6), generator=generator)
    columns = torch.arange(total)[None]
    expected, _ = eager_attention(model, batch, rows, columns)
    with capture_attention(model, rows, columns) as captured:
        model(**batch)
    assert_same(captured.attention, expected)
    blocks = []
    for part in ids:
        n = part.shape[1]
        with capture_attention(model, torch.arange(n)[None], slice(0, n)) as single:
            model(input_ids=part)
        blocks.append(single.attention[0])
    assert_same(captured.attention, pick(torch.block_diag(*blocks)[None], rows, columns))


def test_sliding_window_layers() -> None:
    model, processor = sharp_student(dtype=torch.float64)
    text = model.config.text_config
    text.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    text.sliding_window = 6
    language = model.model.language_model
    language.has_sliding_layers = True
    for layer in language.layers[1:]:
        layer.self_attn.sliding_window = text.sliding_window
    batch, _ = make_batch(processor, samples=2, side="left", dtype=torch.float64)
    rows, columns = random_rows(batch, 6, 5)
    expected, out = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum() + out.loss)
    with capture_attention(model, rows, columns) as captured:
        out = model(**batch)
    assert_same(captured.attention, expected)
    assert_same_gradients(gradients(model, captured.attention.square().sum() + out.loss), reference)
    text.sliding_window = 10**6
    wide, _ = eager_attention(model, batch, rows, columns)
    assert not torch.allclose(wide, expected)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["bool", "float", "biased"])
def test_any_mask(model: Any, heads: int, kind: str) -> None:
    """A mask that is neither causal nor padding, even one for each head."""
    generator = torch.Generator().manual_seed(heads)
    n = 11
    ids = torch.randint(300, (2, n), generator=generator)
    allowed = torch.rand(2, heads, n, n, generator=generator) < 0.5
    allowed |= torch.eye(n, dtype=torch.bool)
    lowest = torch.finfo(torch.float64).min
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)
    if kind == "biased":
        additive += torch.randn(allowed.shape, dtype=torch.float64, generator=generator)
    rows, columns = torch.randint(n, (2, 5), generator=generator), torch.arange(n).repeat(2, 1)
    batch = {"input_ids": ids, "attention_mask": {"full_attention": additive}}
    expected, _ = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum())
    batch = {"input_ids": ids, "attention_mask": {"full_attention": allowed if kind == "bool" else additive}}
    with capture_attention(model, rows, columns) as captured:
        model(**batch)
    assert_same(captured.attention, expected)
    assert_same_gradients(gradients(model, captured.attention.square().sum()), reference)


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    model, processor = sharp_student(dtype=torch.float64)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped = wrapped.to(torch.float64)
    batch, _ = make_batch(processor, dtype=torch.float64)
    rows, columns = random_rows(batch, 5)
    expected, out = eager_attention(wrapped.get_base_model(), batch, rows, columns)
    reference = gradients(wrapped, expected.square().sum() + out.loss)
    assert all("lora_" in name for name in reference)
    for use_checkpoints in (False, True):
        if use_checkpoints:
            wrapped.get_base_model().enable_input_require_grads()
            checkpoint_layers(wrapped.get_base_model())
        with capture_attention(wrapped, rows, columns) as captured:
            out = wrapped(**batch)
        assert_same(captured.attention, expected)
        found = gradients(wrapped, captured.attention.square().sum() + out.loss)
        assert_same_gradients(found, reference)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reduced_precision_errs_no_more_than_eager(dtype: torch.dtype, autocast: bool, seed: int) -> None:
    """Both errors are against double precision; the eager run has the same rounding inside the model."""
    exact, processor = sharp_student(seed=seed, layers=2, dtype=torch.float64)
    batch, _ = make_batch(processor)
    rows, columns = random_rows(batch, 40, seed)
    double = dict(batch, pixel_values_videos=batch["pixel_values_videos"].double())
    with torch.no_grad():
        truth, _ = eager_attention(exact, double, rows, columns)
    model = sharp_student(seed=seed, layers=2)[0]
    if not autocast:
        model = model.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        eager, _ = eager_attention(model, batch, rows, columns)
        with capture_attention(model, rows, columns) as captured:
            model(**batch)
    assert captured.attention.dtype == torch.float32
    error = (captured.attention.double() - truth).abs()
    allowed = (eager.double() - truth).abs()
    rounding = torch.finfo(dtype).eps * float(truth.max())
    assert float(error.max()) <= 2 * float(allowed.max()) + rounding
    assert float(error.mean()) <= 2 * float(allowed.mean())


def test_autocast_gradients_with_checkpoints() -> None:
    model, processor = sharp_student(layers=2)
    batch, _ = make_batch(processor)
    rows, columns = random_rows(batch, 5)
    found = []
    for use_checkpoints in (False, True):
        if use_checkpoints:
            checkpoint_layers(model)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            capture_attention(model, rows, columns) as captured,
        ):
            out = model(**batch)
        found.append(gradients(model, captured.attention.square().sum() + out.loss))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_compiled_model() -> None:
    """Breaks the graph at each attention; leaves the compiled code valid for runs without a capture."""
    model, _ = sharp_student(layers=1, dtype=torch.float64)
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    rows, columns = torch.tensor([[8, 3], [5, -1]]), torch.arange(6).repeat(2, 1)
    expected, out = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum() + out.loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with capture_attention(compiled, rows, columns) as captured:
            out = compiled(**batch)
        assert_same(captured.attention, expected)
    assert_same_gradients(gradients(model, captured.attention.square().sum() + out.loss), reference)
    assert_same(compiled(**batch).loss, out.loss)
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        capture_attention(compiled, rows, columns) as captured,
    ):
        compiled(**batch)
    assert_same(captured.attention, expected)


def test_keeps_little_under_checkpoints(model: Any, student: Any) -> None:
    """A checkpointed layer keeps its input; the capture adds keys and the queries of the chosen rows."""
    batch, _ = make_batch(student[1], samples=1, dtype=torch.float64)
    checkpoint_layers(model)
    text = model.config.text_config
    length = batch["input_ids"].shape[1]
    rows = torch.tensor([[length - 2, length - 3]])
    with kept_numbers() as plain:
        model(**batch)
    with kept_numbers() as watched, capture_attention(model, rows, slice(0, 8)) as captured:
        model(**batch)
        assert captured.attention.requires_grad
    width = text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * length * width
    queries = text.num_attention_heads * rows.shape[1] * width
    small = 4 * length
    added = sum(watched.values()) - sum(plain.values())
    assert keys <= added / 8 <= text.num_hidden_layers * (keys + queries + small)


def test_keeps_a_fraction_of_what_eager_keeps() -> None:
    assert_keeps_a_third(sharp_student(layers=2)[0])


def test_custom_checkpoint_function(model: Any, batch: Any) -> None:
    """Any non-re-entrant checkpoint works, also one wrapped in a function of one's own."""
    rows, columns = random_rows(batch, 4)
    expected, out = eager_attention(model, batch, rows, columns)
    reference = gradients(model, expected.square().sum() + out.loss)
    checkpoint_layers(model)

    def wrapped(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, early_stop=False)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=functools.partial(wrapped))
    with capture_attention(model, rows, columns) as captured:
        out = model(**batch)
    assert_same_gradients(gradients(model, captured.attention.square().sum() + out.loss), reference)
