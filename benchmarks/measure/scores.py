"""The scores of heads and tokens: scans over what the statistics kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mekernels import motion_scores, reference, token_motion_scores

from .checks import assert_error_rule
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import TEACHERS, Teacher, randn
from .work import Work

Scores = tuple[Tensor, Tensor, Tensor]


def _ours(diagonal: Tensor, tau: Tensor, squares: Tensor) -> Scores:
    scores = motion_scores(diagonal, tau, squares)
    return scores.dfc, scores.tcs, scores.dsr


def plain_scores(diagonal: Tensor, tau: Tensor, squares: Tensor) -> Scores:
    """All heads at once in plain torch, in the dtype given."""
    threshold = tau[:, None, None, None]
    above = diagonal > threshold
    begins = torch.cat([above[:, :, :1], above[:, :, 1:] & ~above[:, :, :-1]], dim=2)
    entries, runs = above.sum((1, 2)), begins.sum((1, 2))
    inside = diagonal.square().sum((1, 2, 3))
    consistency = (entries / runs.clamp(min=1).to(diagonal.dtype)).mean(1)
    share = (diagonal >= threshold).to(diagonal.dtype).mean((1, 2, 3))
    return inside / (squares - inside), consistency, share


def _head_work(shape: Teacher) -> Work:
    frames, positions = shape.grid[0], shape.video.positions

    def make(seed: int) -> Scores:
        # Spread like softmax weights: most far below the mean, few above.
        diagonal = randn(shape.heads, frames, frames, positions, seed=seed).mul_(2).exp_()
        diagonal /= shape.video.vision
        tau = diagonal.mean((1, 2, 3))
        return diagonal, tau, 3 * diagonal.double().square().sum((1, 2, 3)).float()

    @cache
    def wanted() -> tuple[Scores, Scores]:
        inputs = make(0)
        return plain_scores(*(part.double() for part in inputs)), plain_scores(*inputs)

    def check(role: str, result: Scores, inputs: tuple[Any, ...]) -> None:
        for found, exact, plain in zip(result, *wanted(), strict=True):
            assert_error_rule(found, exact, plain)
        diagonal, tau, squares = (part[:1].double().cpu() for part in inputs)
        for found, exact in zip(result, _by_definition(diagonal, tau, squares), strict=True):
            assert torch.allclose(found[:1].double().cpu(), exact, rtol=1e-5), "differs from the definition"

    count = shape.heads * frames**2 * positions
    return Work(
        "motion_scores",
        shape.case,
        make,
        {**roles("motion_scores", _probe_heads, _ours), "plain torch": plain_scores},
        check,
        torch.float32,
        shape.video.length,
        moved=4.0 * count,
        operations=4.0 * count,
        op="motion_scores",
    )


def _by_definition(diagonal: Tensor, tau: Tensor, squares: Tensor) -> Scores:
    """The first head by the reference, whose runs are counted one by one."""
    return reference.motion_scores(diagonal, tau, squares)


def _token_work(shape: Teacher) -> Work:
    video = shape.video

    def make(seed: int) -> tuple[Tensor]:
        return (randn(shape.text or shape.words, video.vision, seed=seed).softmax(-1),)

    def ours(attention: Tensor) -> Tensor:
        return token_motion_scores(attention, video)

    def plain(attention: Tensor) -> Tensor:
        return reference.token_motion_scores(attention, video)

    def check(role: str, result: Tensor, inputs: tuple[Any, ...]) -> None:
        exact = reference.token_motion_scores(inputs[0].double(), video)
        assert_error_rule(result, exact, reference.token_motion_scores(inputs[0], video))

    count = (shape.text or shape.words) * video.vision
    return Work(
        "token_motion_scores",
        shape.case,
        make,
        {**roles("token_motion_scores", _probe_tokens, ours), "plain torch": plain},
        check,
        torch.float32,
        video.length,
        moved=4.0 * count,
        operations=1.0 * count,
        op="token_motion_scores",
    )


def _probe_heads() -> None:
    diagonal = randn(1, 2, 2, 4, seed=0)
    motion_scores(diagonal, diagonal[:, 0, 0, 0], diagonal[:, 0, 0, 0])


def _probe_tokens() -> None:
    shape = Teacher("probe", (2, 2, 2), 0, 1, 16)
    token_motion_scores(randn(2, shape.video.vision, seed=0), shape.video)


@cache
def _head_backends() -> list[str]:
    return others("motion_scores", _probe_heads)


@cache
def _token_backends() -> list[str]:
    return others("token_motion_scores", _probe_tokens)


def head_plans(size: str) -> list[Plan]:
    named = ("ours", *map(label, _head_backends()), "plain torch")
    return [Plan(shape.case, named, lambda shape=shape: _head_work(shape)) for shape in _layers(size)]


def token_plans(size: str) -> list[Plan]:
    named = ("ours", *map(label, _token_backends()), "plain torch")
    return [Plan(shape.case, named, lambda shape=shape: _token_work(shape)) for shape in _layers(size)]


def _layers(size: str) -> list[Teacher]:
    """Memory leaves the scores as they are; the first real sizes suit two cores too."""
    if size == "scaled":
        return [shape for shape in TEACHERS["real"] if shape.fold == 1 and shape.heads == 48]
    return [shape for shape in TEACHERS[size] if shape.fold == 1]
