"""The gradient of the chosen rows is added to the attention's gradient of its query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import mekernels
from mekernels.attention_rows import shared_query
from motionenhancer.students import capture_attention

HEADS, WIDTH, LENGTH = 4, 8, 11
ROWS = torch.tensor([[6, 9, -1], [10, 7, 7]])
PADDED = torch.ones(2, LENGTH, dtype=torch.int64)
PADDED[0, :3] = 0
PACKED = torch.cat([torch.arange(5), torch.arange(6)])[None]


def language_model(implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HEADS * WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    config = Qwen2Config(**sizes, num_attention_heads=HEADS, num_key_value_heads=2)
    config._attn_implementation = implementation
    return Qwen2ForCausalLM(config).train()


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of zeros and copies as large as a query."""
    found: list[tuple[int, ...]] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> torch.Tensor:
            made = original(*args, **options)
            if {HEADS, LENGTH, WIDTH} <= set(made.shape):
                found.append(tuple(made.shape))
            return made

        monkeypatch.setattr(owner, name, watched)

    # These counts of references are cached; take them before allocations are watched.
    shared_query._alone(False), shared_query._alone(True)
    for name in ("clone", "new_zeros"):
        watch(torch.Tensor, name)
    for name in ("zeros", "zeros_like"):
        watch(torch, name)
    return found


def backward(model: Any, backend: str = "auto", **batch: torch.Tensor) -> None:
    batch = {"input_ids": torch.arange(2 * LENGTH).view(2, LENGTH) % 16, "use_cache": False, **batch}
    rows = ROWS[: len(batch["input_ids"])]
    with mekernels.use_backend(backend), capture_attention(model, rows, slice(0, 6)) as captured:
        out = model(**batch)
        (out.logits.square().mean() + captured.attention.square().sum()).backward()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "lora", "padded", "packed"])
def test_no_tensor_of_the_querys_size_is_made(
    kind: str, implementation: str, backend: str, dense: list[tuple[int, ...]]
) -> None:
    model = language_model(implementation)
    batch: dict[str, torch.Tensor] = {}
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"]))
    if kind == "padded":
        batch["attention_mask"] = PADDED
    if kind == "packed":
        batch |= {"input_ids": torch.arange(LENGTH)[None] % 16, "position_ids": PACKED}
    backward(model, backend, **batch)
    assert dense == []


def test_what_is_counted_would_be_seen(dense: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_query, "_COUNTS", False)
    backward(language_model())
    assert dense == [(2, HEADS, LENGTH, WIDTH)] * 2, "a copy of the gradient of each layer"
