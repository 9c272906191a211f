"""One evaluation of a teacher during reconstruction: guided, with memory, its attention read or not."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device
from .checks import assert_error_rule
from .plan import Plan
from .shapes import Teacher, dtype, randn
from .teacher_layer import EagerStatistics, Read, by_rows, compare, judged, statistics_of
from .work import Work

TIMESTEP = 599
ROW = 1
"""Batch: generated under the empty prompt and the prompt, then the same two of the reference."""


class Small(NamedTuple):
    """A CogVideoX with few layers."""

    shape: Teacher
    layers: int
    text_width: int = 32


MODELS = {
    "tiny": [Small(Teacher("CogVideoX, tiny, 2 layers", (2, 2, 3), 16, 2, 16, 2, words=4), 2)],
    "scaled": [
        Small(Teacher("CogVideoX-5B / 14, 2 layers, 17 frames", (5, 8, 12), 32, 4, 64, 2, words=12), 2),
        Small(Teacher("CogVideoX-5B / 14, 2 layers, 49 frames", (13, 8, 12), 32, 4, 64, 2, words=12), 2),
    ],
    "real": [
        Small(Teacher("CogVideoX-5B, 2 of 42 layers, 49 frames", (13, 30, 45), 226, 48, 64, 2), 2),
    ],
}


class Reader:
    """What a teacher hands its attention to."""

    def __init__(self, read: Any) -> None:
        self.read = read

    def self_attention(self, query: Tensor, key: Tensor, lse: Tensor, fold: int) -> None:
        self.read(query, key, lse, fold)

    def cross_attention(self, text: Tensor, vision: Tensor) -> None:
        raise AssertionError("CogVideoX has no cross-attention")

    __call__ = self_attention


def _save(small: Small, folder: str) -> None:
    from motionenhancer.toy.models import save_teacher

    frames, height, width = small.shape.grid
    save_teacher(
        folder,
        layers=small.layers,
        heads=small.shape.heads,
        head_dim=small.shape.width,
        frames=4 * (frames - 1) + 1,
        height=8 * height,
        width=8 * width,
        text_length=small.shape.text,
        text_width=small.text_width,
        scaling_factor=1.0,
    )


def _work(small: Small) -> Work:
    from motionenhancer.teachers import load_teacher

    shape = small.shape
    folder = tempfile.TemporaryDirectory()
    _save(small, folder.name)
    teacher = load_teacher(Path(folder.name), device.device(), dtype())
    frames, height, width = shape.grid

    def make(seed: int) -> tuple[Tensor, Tensor]:
        latents = randn(4, frames, 8, 2 * height, 2 * width, seed=seed)
        return latents, randn(4, shape.text, small.text_width, seed=seed + 1, kind=dtype())

    def evaluate(reader: Reader | None, latents: Tensor, embeds: Tensor, model: Any = teacher) -> Tensor:
        with model.reading(reader, memory=True, row=ROW):
            return model.predict(latents, embeds, TIMESTEP)[:2]

    statistics = statistics_of(shape)

    def ours(latents: Tensor, embeds: Tensor) -> Read:
        reader = Reader(lambda query, key, lse, fold: statistics.update(query, key, lse, fold=fold))
        out = evaluate(reader, latents, embeds)
        state = statistics.state_dict()
        return Read(out, state["diagonal"], state["rows"], state["vision_mass"])

    def plain(latents: Tensor, embeds: Tensor) -> Read:
        return Read(evaluate(None, latents, embeds))

    def eager(latents: Tensor, embeds: Tensor) -> Read:
        maps = EagerStatistics(shape)
        out = evaluate(Reader(lambda query, key, lse, fold: maps.read(query, key)), latents, embeds)
        return Read(out, *maps.sums)

    @cache
    def wanted(kind: torch.dtype) -> tuple[Tensor, list[Read]]:
        model = teacher if kind == dtype() else load_teacher(Path(folder.name), device.device(), kind)
        seen: list[tuple[Tensor, Tensor]] = []
        latents, embeds = make(0)
        reader = Reader(lambda query, key, lse, fold: seen.append((query, key)))
        out = evaluate(reader, latents, embeds.to(kind), model)
        heads = []
        for head in judged(shape.heads):
            layers = [
                by_rows(shape, query[:, head : head + 1], key[:, head : head + 1], key[:, head : head + 1])
                for query, key in seen
            ]
            sums = [sum(parts) for parts in list(zip(*layers, strict=True))[1:]]
            heads.append(Read(out, *sums))
        return out, heads

    def check(role: str, result: Read, inputs: tuple[Any, ...]) -> None:
        (exact_out, exact), (plain_out, plainly) = wanted(torch.float64), wanted(dtype())
        assert_error_rule(result.out, exact_out.double(), plain_out)
        compare(shape, result, exact, plainly)

    return Work(
        "teacher evaluation, attention read",
        shape.case,
        make,
        {"ours": ours, "no reading": plain, "eager map": eager},
        check,
        dtype(),
        shape.video.length,
        op="motion_statistics_update",
        held=folder,
    )


def plans(size: str) -> list[Plan]:
    roles = ("ours", "no reading", "eager map")
    return [Plan(small.shape.case, roles, lambda small=small: _work(small)) for small in MODELS[size]]
