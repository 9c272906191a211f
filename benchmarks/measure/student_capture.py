"""What capture adds to a training step of a deep, tiny student: forward, backward and AdamW, layer by layer.

The smaller a model's layers, the more a read next to each of them weighs. The learning rate is 0: every step
does all of its work on the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import assert_error_rule
from .plan import Plan
from .shapes import dtype, randn
from .student_model import eager_rows, implementation, placed
from .work import Work

Result = tuple[Tensor, ...]
CHECKED_TOKENS = 96


class DeepStudent(NamedTuple):
    """A Qwen2 of many small layers; the words of which rows are read come last, behind the video."""

    case: str
    layers: int
    hidden: int
    tokens: int
    rows: int = 24
    heads: int = 4
    key_heads: int = 2

    @property
    def columns(self) -> slice:
        return slice(16, 16 + 3 * (self.tokens - 16) // 4)


def _named(layers: int, hidden: int, tokens: int, rows: int = 24) -> DeepStudent:
    return DeepStudent(f"{layers} layers, {hidden} wide, {tokens} tokens", layers, hidden, tokens, rows)


DEEP_STUDENTS = {
    "tiny": [_named(3, 32, 48, 4)],
    "scaled": [_named(12, 256, 512), _named(24, 64, 256, 12), _named(6, 256, 2048)],
    "real": [_named(28, 1024, 2048)],
}


def deep_student(shape: DeepStudent) -> Any:
    """A causal language model in training mode, random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=1 << 16,
        use_cache=False,
    )
    return placed(Qwen2ForCausalLM, config)


def _rows(shape: DeepStudent, ids: Tensor) -> Tensor:
    end = ids.shape[1]
    return torch.arange(end - shape.rows, end, device=ids.device)[None]


def _finish(model: Any, optimizer: Any, loss: Tensor, picked: Tensor | None) -> Result:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    attention = model.model.layers[0].self_attn
    found = loss.detach(), attention.q_proj.weight.grad.clone(), attention.k_proj.weight.grad.clone()
    optimizer.step()
    return found if picked is None else (*found, picked.detach())


def _captured(model: Any, optimizer: Any, shape: DeepStudent, ids: Tensor, above: Tensor) -> Result:
    from motionenhancer.students.capture import capture_attention

    with capture_attention(model, _rows(shape, ids), shape.columns) as captured:
        out = model(input_ids=ids, labels=ids)
    picked = captured.attention
    return _finish(model, optimizer, out.loss + (picked * above).sum(), picked)


def _plain(model: Any, optimizer: Any, shape: DeepStudent, ids: Tensor, above: Tensor) -> Result:
    return _finish(model, optimizer, model(input_ids=ids, labels=ids).loss, None)


def _eager(model: Any, optimizer: Any, shape: DeepStudent, ids: Tensor, above: Tensor) -> Result:
    with implementation(model, "eager"):
        out = model(input_ids=ids, labels=ids, output_attentions=True)
    picked = eager_rows(out, _rows(shape, ids), shape.columns)
    return _finish(model, optimizer, out.loss + (picked * above).sum(), picked)


ROLES: dict[str, Callable[..., Result]] = {
    "ours": _captured,
    "plain step": _plain,
    "output_attentions=True": _eager,
}


def work(shape: DeepStudent) -> Work:
    """The three ways of one training step, checked on a shorter sequence in float64."""
    model = deep_student(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def make(seed: int, shape: DeepStudent = shape) -> tuple[Tensor, ...]:
        ids = randn(1, shape.tokens, seed=seed).mul(1000).long().remainder(512)
        return ids, randn(1, shape.rows, shape.columns.stop - shape.columns.start, seed=seed + 1)

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        assert all(bool(part.isfinite().all()) for part in result), "a result is not finite"
        from students_support import full_precision_softmax

        small = shape._replace(tokens=min(shape.tokens, CHECKED_TOKENS))
        ids, above = make(0, small)
        by_map = _plain if role == "plain step" else _eager
        precise = copy.deepcopy(model).double()
        idle = torch.optim.SGD(precise.parameters(), lr=0.0)
        with full_precision_softmax():
            exact = by_map(precise, idle, small, ids, above.double())
        plain = by_map(model, optimizer, small, ids, above)
        found = ROLES[role](model, optimizer, small, ids, above)
        for one, other, another in zip(found, exact, plain, strict=True):
            assert_error_rule(one, other.double(), another, factor=3.0, rounding=dtype())

    return Work(
        "deep student's training step, rows captured",
        shape.case,
        make,
        {name: partial(call, model, optimizer, shape) for name, call in ROLES.items()},
        check,
        dtype(),
        shape.tokens,
        op="attention_rows",
    )


def plans(size: str) -> list[Plan]:
    return [Plan(shape.case, tuple(ROLES), lambda shape=shape: work(shape)) for shape in DEEP_STUDENTS[size]]
