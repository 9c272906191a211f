"""A capture refuses unsupported calls and leaves everything unchanged."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import pytest
import torch
from students_support import checkpoint_layers, restore, sharp_student
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from mekernels.attention_rows import shared_query
from motionenhancer.students import capture_attention
from motionenhancer.students.attention_registry import ObservedCall
from motionenhancer.students.entries import ForwardEntries

ROWS, COLUMNS = torch.tensor([[4, 5]]), slice(0, 3)


@pytest.fixture(scope="module")
def student() -> Any:
    return sharp_student(layers=2)[0]


@pytest.fixture
def model(student: Any) -> Any:
    yield student
    restore(student)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(7)[None]


def registry() -> tuple[Any, ...]:
    functions = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}
    return (
        functions,
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        modeling_qwen2_5_vl.eager_attention_forward,
    )


def state(model: Any) -> list[Any]:
    return [
        (name, {k: v for k, v in vars(module).items() if not k.startswith("_modules")})
        for name, module in model.named_modules()
    ]


@pytest.fixture(autouse=True)
def registry_is_left_alone() -> Any:
    before = registry()
    yield
    assert registry() == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_registry_is_wrapped_only_inside(model: Any, ids: torch.Tensor, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    before = registry()
    with capture_attention(model, ROWS, COLUMNS):
        assert registry() != before
        model(input_ids=ids)
    assert registry() == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_exception_inside(model: Any, ids: torch.Tensor, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    before = registry()
    with contextlib.suppress(KeyError), capture_attention(model, ROWS, COLUMNS):
        model(input_ids=ids)
        raise KeyError
    assert registry() == before
    with capture_attention(model, ROWS, COLUMNS) as captured:
        model(input_ids=ids)
    assert captured.attention.shape == (1, 2, 3)


def test_model_is_left_alone(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids)
    before = state(model)
    with capture_attention(model, ROWS, COLUMNS):
        assert state(model) == before
        model(input_ids=ids)
    assert state(model) == before


def test_failed_forward(model: Any, ids: torch.Tensor) -> None:
    handle = model.model.language_model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyError)
    )
    with capture_attention(model, ROWS, COLUMNS) as captured:
        with pytest.raises(KeyError):
            model(input_ids=ids)
        handle.remove()
    # Both attentions ran before the second layer's perceptron failed, so the value is complete.
    assert captured.attention.shape == (1, 2, 3)
    handle = model.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyError)
    )
    with capture_attention(model, ROWS, COLUMNS) as captured, pytest.raises(KeyError):
        model(input_ids=ids)
    handle.remove()
    with pytest.raises(RuntimeError, match="1 of the 2 attention layers"):
        _ = captured.attention


def test_own_entry_survives(model: Any, ids: torch.Tensor) -> None:
    """A function that someone else put into the registry's instance is called and put back."""
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with capture_attention(model, ROWS, COLUMNS) as captured:
            model(input_ids=ids)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert len(calls) == captured.layers
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_entry_registered_meanwhile_survives(model: Any, ids: torch.Tensor) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    with capture_attention(model, ROWS, COLUMNS):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    try:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_nested(model: Any, ids: torch.Tensor) -> None:
    with capture_attention(model, ROWS, COLUMNS) as captured:
        with (
            pytest.raises(RuntimeError, match="nested nor concurrent"),
            capture_attention(model, ROWS, COLUMNS),
        ):
            pass
        model(input_ids=ids)
    assert captured.attention.shape == (1, 2, 3)


def test_concurrent(model: Any) -> None:
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with capture_attention(model, ROWS, COLUMNS):
                pass
        except RuntimeError as error:
            raised.append(error)

    with capture_attention(model, ROWS, COLUMNS):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(raised) == 1
    assert "concurrent" in str(raised[0])


def test_another_model_passes_unseen(model: Any, ids: torch.Tensor) -> None:
    other, _ = sharp_student(layers=1, seed=1)
    with capture_attention(model, ROWS, COLUMNS) as captured:
        other(input_ids=ids)
        with pytest.raises(RuntimeError, match="no forward"):
            _ = captured.attention
        model(input_ids=ids)
        other(input_ids=ids)
    with capture_attention(model, ROWS, COLUMNS) as alone:
        model(input_ids=ids)
    assert torch.equal(captured.attention, alone.attention)


def test_no_forward(model: Any) -> None:
    with capture_attention(model, ROWS, COLUMNS) as captured:
        pass
    with pytest.raises(RuntimeError, match="no forward"):
        _ = captured.attention


def test_two_forwards(model: Any, ids: torch.Tensor) -> None:
    with capture_attention(model, ROWS, COLUMNS) as captured:
        model(input_ids=ids)
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="more than once"):
        _ = captured.attention


def test_generation_with_cache(model: Any, ids: torch.Tensor) -> None:
    with (
        pytest.raises(ValueError, match=r"1 queries for 8 keys: .*, or capture with rows=None"),
        capture_attention(model, ROWS, COLUMNS),
    ):
        model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)


def test_reentrant_checkpointing(model: Any, ids: torch.Tensor) -> None:
    checkpoint_layers(model, use_reentrant=True)
    model.eval()
    with capture_attention(model, ROWS, COLUMNS) as captured:
        model(input_ids=ids)
    assert captured.attention.requires_grad
    model.train()
    with (
        pytest.raises(ValueError, match="re-entrant gradient checkpointing silently drops"),
        capture_attention(model, ROWS, COLUMNS),
    ):
        pass


def test_hidden_reentrant_checkpointing(model: Any, ids: torch.Tensor) -> None:
    checkpoint_layers(model)
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=lambda f, *a: checkpoint(f, *a, use_reentrant=True)
    )
    with (
        capture_attention(model, ROWS, COLUMNS),
        pytest.raises(ValueError, match="re-entrant gradient checkpointing silently drops"),
    ):
        model(input_ids=ids)


def test_no_grad_is_no_checkpoint(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad(), capture_attention(model, ROWS, COLUMNS) as captured:
        model(input_ids=ids)
    assert not captured.attention.requires_grad


def test_inference_mode(model: Any, ids: torch.Tensor) -> None:
    """It also works as the first capture of a process, which runs a small backward for itself."""
    shared_query._alone.cache_clear()
    with torch.inference_mode(), capture_attention(model, None, COLUMNS) as captured:
        model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2)
    with capture_attention(model, torch.tensor([[6]]), COLUMNS) as alone:
        model(input_ids=ids)
    torch.testing.assert_close(captured.attention[:, :1], alone.attention)
    assert alone.attention.requires_grad


def test_selective_checkpointing(model: Any, ids: torch.Tensor) -> None:
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    checkpoint_layers(model, use_reentrant=False, context_fn=context)
    with (
        capture_attention(model, ROWS, COLUMNS),
        pytest.raises(ValueError, match="selective activation checkpointing"),
    ):
        model(input_ids=ids)


def test_data_parallel(model: Any) -> None:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with (
        pytest.raises(ValueError, match="DataParallel over 2 devices"),
        capture_attention(wrapped, ROWS, COLUMNS),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "columns", "error", "message"),
    [
        ([[4]], COLUMNS, TypeError, "rows must be a tensor"),
        (ROWS, [[4]], TypeError, "columns must be a tensor"),
        (ROWS.int(), COLUMNS, ValueError, r"rows must be \(batch, count\) int64, got \(1, 2\) torch.int32"),
        (ROWS[0], COLUMNS, ValueError, "rows must be"),
        (ROWS, ROWS.float(), ValueError, "columns must be"),
        (ROWS, ROWS.repeat(2, 1), ValueError, r"columns must have one entry per sample \(1\), got 2"),
        (ROWS, slice(0, 8, 2), ValueError, "slice of step 1"),
        (ROWS, slice(3, None), ValueError, "0 <= start <= stop"),
        (ROWS, slice(3, 2), ValueError, "0 <= start <= stop"),
        (ROWS, slice(-3, 2), ValueError, "0 <= start <= stop"),
    ],
)
def test_bad_positions(model: Any, rows: Any, columns: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), capture_attention(model, rows, columns):
        pass


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS.repeat(2, 1), COLUMNS, r"one entry per sample \(1\), got 2"),
        (torch.tensor([[7]]), COLUMNS, "below the 7 tokens, got 7"),
        (ROWS, slice(0, 8), "below the 7 tokens, got 7"),
        (ROWS, torch.tensor([[9]]), "below the 7 tokens, got 9"),
    ],
)
def test_positions_that_do_not_fit(
    model: Any, ids: torch.Tensor, rows: torch.Tensor, columns: Any, message: str
) -> None:
    with capture_attention(model, rows, columns), pytest.raises(ValueError, match=message):
        model(input_ids=ids)


def test_weights_that_are_not_numbers_show(model: Any, ids: torch.Tensor) -> None:
    """Non-finite weights give non-finite entries, not other numbers, in a forward and in generation."""
    weight = model.model.language_model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] = torch.nan
        with capture_attention(model, ROWS, COLUMNS) as captured:
            model(input_ids=ids)
        with capture_attention(model, None, COLUMNS) as words:
            model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2)
        weight[0, 0] = kept
    assert captured.attention.isnan().all()
    assert words.attention.isnan().all()


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_positions_that_the_host_does_not_check(
    monkeypatch: pytest.MonkeyPatch, model: Any, ids: torch.Tensor, reduce: str
) -> None:
    """As on a GPU, where a check would wait: a position beyond the sequence makes all results NaN."""
    read = []
    for rows, columns in ((ROWS, [[0, 6]]), (torch.tensor([[4, 7]]), [[0, 6]]), (ROWS, [[0, 7]])):
        with capture_attention(model, ROWS, torch.tensor([[0, 6]]), reduce=reduce) as captured:
            model(input_ids=ids)
        with monkeypatch.context() as patch:
            patch.setattr("motionenhancer.students.entries.read_by_host", lambda _: False)
            with capture_attention(model, rows, torch.tensor(columns), reduce=reduce) as unchecked:
                model(input_ids=ids)
        read.append(unchecked.attention)
    torch.testing.assert_close(read[0], captured.attention)
    assert read[1].isnan().all()
    assert read[2].isnan().all()


def test_flash_attention_rounds_what_single_precision_norms_made() -> None:
    """Queries and keys are cast to the dtype of the layer's weights, as transformers does."""
    query, key = torch.randn(2, 1, 2, 5, 4)
    read = []
    for dtype in (torch.float32, torch.bfloat16):
        entries = ForwardEntries(torch.arange(5)[None], slice(0, 5), 1, None, "mean")
        layer = nn.Linear(4, 4, dtype=torch.bfloat16)
        given = query.to(dtype), key.to(dtype), None, {"is_causal": False}
        entries.read(ObservedCall("flash_attention_2", layer, *given))
        read.append(entries.attention)
    assert torch.equal(*read)


def test_options_that_are_given_by_position(model: Any) -> None:
    module = model.model.language_model.layers[0].self_attn
    query, key = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)
    with (
        capture_attention(model, ROWS, COLUMNS),
        pytest.raises(ValueError, match="must pass the options of its attention by keyword"),
    ):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, key, None, 0.0, 0.25)


def test_empty_rows_and_columns(model: Any, ids: torch.Tensor) -> None:
    nothing = torch.empty(1, 0, dtype=torch.int64)
    with capture_attention(model, nothing, COLUMNS) as captured:
        model(input_ids=ids)
    assert captured.attention.shape == (1, 0, 3)
    with capture_attention(model, ROWS, nothing) as captured:
        model(input_ids=ids)
    assert captured.attention.shape == (1, 2, 0)


def test_not_a_language_model() -> None:
    with (
        pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"),
        capture_attention("model", ROWS, COLUMNS),
    ):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(ValueError, match="found none in Linear"),
        capture_attention(nn.Linear(2, 2), ROWS, COLUMNS),
    ):
        pass


def test_unknown_implementation(model: Any, ids: torch.Tensor) -> None:
    ALL_ATTENTION_FUNCTIONS["my_attention"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    text = model.config.text_config
    before = text._attn_implementation
    text._attn_implementation_internal = "my_attention"
    try:
        with capture_attention(model, ROWS, COLUMNS), pytest.raises(ValueError, match="'my_attention'"):
            model(input_ids=ids)
    finally:
        text._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS["my_attention"]


def test_implementation_changed_inside(model: Any, ids: torch.Tensor) -> None:
    with capture_attention(model, ROWS, COLUMNS) as captured:
        model.set_attn_implementation("eager")
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="no forward"):
        _ = captured.attention


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"])
def test_scores_that_queries_and_keys_do_not_tell(model: Any, name: str) -> None:
    module = model.model.language_model.layers[0].self_attn
    query = torch.randn(1, 4, 7, 16)
    key = torch.randn(1, 2, 7, 16)
    given = {"position_bias": torch.zeros(1, 4, 7, 7), "softcap": 5.0}
    extra: dict[str, Any] = {name: given.get(name, torch.ones(4))}
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: (None, None)
    try:
        with capture_attention(model, ROWS, COLUMNS), pytest.raises(ValueError, match=name):
            ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, key, None, scaling=0.25, **extra)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_an_option_of_the_attention_that_is_not_read(model: Any) -> None:
    """A named option of an attention function may change the attention, unless it has its default."""
    module = model.model.language_model.layers[0].self_attn
    query, key = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)

    def attend(module, query, key, value, attention_mask, scaling=None, temperature=1.0, **kwargs):
        return None, None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        with capture_attention(model, ROWS, COLUMNS):
            forward = ALL_ATTENTION_FUNCTIONS["sdpa"]
            forward(module, query, key, key, None, scaling=0.25, temperature=1.0, elsewhere=2)
            other = model.model.language_model.layers[1].self_attn
            with pytest.raises(ValueError, match="gives its attention temperature"):
                forward(other, query, key, key, None, scaling=0.25, temperature=2.0)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_heads_split_over_devices(model: Any) -> None:
    module = model.model.language_model.layers[0].self_attn
    query = torch.randn(1, 2, 7, 16)
    with (
        capture_attention(model, ROWS, COLUMNS),
        pytest.raises(ValueError, match="all 4 heads on one device"),
    ):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query[:, :1], query[:, :1], None, scaling=0.25)
