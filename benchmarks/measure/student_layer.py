"""One layer of a language model, forward and backward: captured, plain, or with output_attentions=True."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .checks import assert_error_rule
from .plan import Plan
from .shapes import STUDENTS, Student, dtype, randn
from .student_model import eager_rows, implementation, language_layer
from .student_rows import chosen_rows
from .work import Work

CHECKED_TOKENS = 512
Result = tuple[Tensor, ...]


def _step(model: Any, loss: Tensor, picked: Tensor) -> Result:
    loss.backward()
    attention = model.layers[0].self_attn
    found = picked.detach(), attention.q_proj.weight.grad, attention.k_proj.weight.grad
    model.zero_grad(set_to_none=True)
    return found


def _captured(model: Any, shape: Student, embeds: Tensor, above: Tensor) -> Result:
    from motionenhancer.students.capture import capture_attention

    with capture_attention(model, chosen_rows(shape), shape.columns) as captured:
        out = model(inputs_embeds=embeds)
    loss = out.last_hidden_state.float().mean() + (captured.attention * above).sum()
    return _step(model, loss, captured.attention)


def _plain(model: Any, shape: Student, embeds: Tensor, above: Tensor) -> Result:
    hidden = model(inputs_embeds=embeds).last_hidden_state
    return _step(model, hidden.float().mean(), hidden)


def _eager(model: Any, shape: Student, embeds: Tensor, above: Tensor) -> Result:
    with implementation(model, "eager"):
        out = model(inputs_embeds=embeds, output_attentions=True)
    picked = eager_rows(out, chosen_rows(shape), shape.columns)
    return _step(model, out.last_hidden_state.float().mean() + (picked * above).sum(), picked)


ROLES = {"ours": _captured, "plain layer": _plain, "output_attentions=True": _eager}


def _work(shape: Student) -> Work:
    model = language_layer(shape)
    small = shape._replace(tokens=min(shape.tokens, CHECKED_TOKENS))

    def make(seed: int, shape: Student = shape) -> tuple[Tensor, ...]:
        width = shape.columns.stop - shape.columns.start
        hidden = randn(1, shape.tokens, shape.heads * shape.width, seed=seed, kind=dtype())
        return hidden, randn(*chosen_rows(shape).shape, width, seed=seed + 1)

    def check(role: str, result: Result, inputs: tuple[Any, ...]) -> None:
        assert all(bool(part.isfinite().all()) for part in result), "a result is not finite"
        embeds, above = make(0, small)
        found = ROLES[role](model, small, embeds, above)
        precise = copy.deepcopy(model).double()
        by_map = _plain if role == "plain layer" else _eager
        from students_support import full_precision_softmax

        with full_precision_softmax():
            exact = by_map(precise, small, embeds.double(), above.double())
        plain = by_map(model, small, embeds, above)
        for one, other, another, factor in zip(found, exact, plain, (2.0, 3.0, 3.0), strict=True):
            # Our own mean over layers and heads is in float32 whatever the model runs in.
            assert_error_rule(one, other.double(), another, factor=factor, rounding=dtype())

    return Work(
        "student layer with rows captured, forward and backward",
        shape.case,
        make,
        {role: lambda *inputs, call=call: call(model, shape, *inputs) for role, call in ROLES.items()},
        check,
        dtype(),
        shape.tokens,
        op="attention_rows",
    )


def plans(size: str) -> list[Plan]:
    return [Plan(shape.case, tuple(ROLES), lambda shape=shape: _work(shape)) for shape in STUDENTS[size]]
