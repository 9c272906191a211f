"""One attention layer of a teacher, with its motion statistics read or not."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mekernels import (
    MotionStatistics,
    VideoTokens,
    backends,
    diagonal_attention,
    flash_attention,
    reference,
    use_backend,
)

from . import device
from .checks import assert_error_rule
from .dispatch import label, others, roles
from .plan import Plan
from .shapes import TEACHERS, Teacher, dtype, randn
from .work import Work

SAMPLED = 64
CHUNK = 1 << 26
"""Entries of a map that a check holds."""


class Read(NamedTuple):
    """A layer's output, and of its map what the statistics keep."""

    out: Tensor
    diagonal: Tensor | None = None
    rows: Tensor | None = None
    vision_mass: Tensor | None = None


def statistics_of(shape: Teacher) -> MotionStatistics:
    start = shape.video.text_slice.start
    words = range(start, start + min(shape.words, shape.text))
    return MotionStatistics(shape.video, shape.heads, text_rows=list(words), sampled_rows=SAMPLED)


def kept_rows(shape: Teacher) -> Tensor:
    """Positions of the rows that the statistics keep whole, in their order."""
    kept = statistics_of(shape)
    sampled = kept.sampled_rows + shape.video.vision_slice.start
    return torch.cat([kept.text_rows, sampled]).to(device.device())


def read_map(attention: Tensor, video: VideoTokens, index: Tensor, fold: int) -> tuple[Tensor, ...]:
    """Diagonal, kept rows and vision mass of one head's (N, fold * N) map."""
    folded = reference.fold_keys(attention, fold)
    block = folded[video.vision_slice, video.vision_slice]
    # One float32 sum over millions of entries would miss the error rule.
    mass = block.sum(-1).double().sum()
    return reference.diagonal(block, video), folded[index, video.vision_slice], mass


class EagerStatistics:
    """The same statistics from whole maps, one head's at a time, as plain torch does it."""

    def __init__(self, shape: Teacher) -> None:
        self.video, self.fold, self.index = shape.video, shape.fold, kept_rows(shape)
        self.sums: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Read:
        """(1, H, N, D) queries, (1, H, fold * N, D) keys and values."""
        out = torch.empty_like(query)
        self.read(query, key, lambda head, weights: out[0, head].copy_(weights @ value[0, head]))
        return Read(out, *self.sums)

    def read(self, query: Tensor, key: Tensor, use: Any = None) -> None:
        """Add a layer; ``use`` is given every head's map in the dtype of the queries."""
        heads = []
        for head in range(query.shape[1]):
            scores = query[0, head] @ key[0, head].T * query.shape[3] ** -0.5
            attention = scores.softmax(-1, dtype=torch.float32)
            if use is not None:
                use(head, attention.to(query.dtype))
            heads.append(read_map(attention, self.video, self.index, self.fold))
        added = [torch.stack(part) for part in zip(*heads, strict=True)]
        self.sums = [a + b for a, b in zip(self.sums, added, strict=True)] if self.sums else added


def _kept(out: Tensor, statistics: MotionStatistics) -> Read:
    state = statistics.state_dict()
    return Read(out, state["diagonal"], state["rows"], state["vision_mass"])


def layer_work(shape: Teacher) -> Work:
    video, kind = shape.video, dtype()
    pools: dict[str, Any] = {}

    def reading(backend: str):
        # The attention is always the fastest available; only the update changes its backend.
        def run(query: Tensor, key: Tensor, value: Tensor) -> Read:
            out, lse = flash_attention(query, key, value)
            with use_backend(backend):
                pools[backend].update(query, key, lse, fold=shape.fold)
            return _kept(out, pools[backend])

        pools[backend] = statistics_of(shape)
        return run

    def make(seed: int) -> tuple[Tensor, ...]:
        size = (1, shape.heads, video.length, shape.width)
        key = (1, shape.heads, shape.fold * video.length, shape.width)
        return tuple(randn(*part, seed=3 * seed + i, kind=kind) for i, part in enumerate((size, key, key)))

    def alone(backend: str):
        return lambda query, key, value: Read(flash_attention(query, key, value, backend=backend)[0])

    eager = EagerStatistics(shape)
    found = {
        "ours": reading("auto"),
        **{label(name): reading(name) for name in _update_backends()},
        "flash alone": lambda q, k, v: Read(F.scaled_dot_product_attention(q, k, v)),
        **{f"{name} alone": alone(name) for name in _flash_backends()},
        "eager map": eager.attend,
    }
    exact = cache(lambda: _exact(shape, make(0)))

    def check(role: str, result: Read, inputs: tuple[Any, ...]) -> None:
        # The check comes before any timing, so that the sums are those of one update.
        for place, head in enumerate(judged(shape.heads)):
            assert_error_rule(result.out[0, head], *(found[place].out for found in exact()))
        compare(shape, result, *exact())

    kept = 1 + len(statistics_of(shape).text_rows) + SAMPLED
    vision, tokens = video.vision, video.length
    inputs = shape.heads * tokens * shape.width * (2 + 2 * shape.fold) * kind.itemsize
    sums = 2 * 4 * shape.heads * vision * (video.frames + kept)
    reads = vision * (video.frames + shape.text) + kept * vision
    return Work(
        "teacher layer with motion statistics",
        shape.case,
        make,
        found,
        check,
        kind,
        tokens,
        moved=inputs + sums,
        operations=shape.heads * shape.fold * shape.width * (4 * tokens**2 + 2 * reads),
        beside=("flash alone", *(f"{name} alone" for name in _flash_backends())),
        op="motion_statistics_update",
    )


def judged(heads: int) -> list[int]:
    return sorted({0, heads - 1})


def _exact(shape: Teacher, inputs: tuple[Tensor, ...]) -> tuple[list[Read], list[Read]]:
    """Float64 and plain results of the first and last head."""
    both: tuple[list[Read], list[Read]] = [], []
    for kind, found in zip((torch.float64, inputs[0].dtype), both, strict=True):
        for head in judged(shape.heads):
            query, key, value = (tensor[:, head : head + 1].to(kind) for tensor in inputs)
            found.append(by_rows(shape, query, key, value))
    return both


def by_rows(shape: Teacher, query: Tensor, key: Tensor, value: Tensor) -> Read:
    video = shape.video
    index = kept_rows(shape)
    frames, positions, vision = video.frames, video.positions, video.vision_slice
    outs, diagonals = [], []
    mass = torch.zeros((), dtype=torch.float64, device=query.device)
    step = max(1, CHUNK // key.shape[2])
    for first in range(0, query.shape[2], step):
        some = torch.arange(first, min(first + step, query.shape[2]), device=query.device)
        attention = reference.attention_map(query[:, :, some], key)
        outs.append((attention @ value)[0, 0])
        folded = reference.fold_keys(attention[0, 0], shape.fold)[:, vision]
        place = some - vision.start
        seen = (place >= 0) & (place < video.vision)
        folded, place = folded[seen], place[seen]
        mass += folded.sum().double()
        own = (place % positions)[:, None, None].expand(-1, frames, 1)
        diagonals.append(folded.unflatten(1, (frames, positions)).gather(2, own)[..., 0])
    diagonal = torch.cat(diagonals).unflatten(0, (frames, positions)).permute(0, 2, 1)
    rows = reference.fold_keys(reference.attention_map(query[:, :, index], key)[0, 0], shape.fold)
    return Read(torch.cat(outs), diagonal, rows[:, vision], mass)


def compare(shape: Teacher, result: Read, exact: list[Read], plain: list[Read]) -> None:
    for place, head in enumerate(judged(shape.heads)):
        for name in ("diagonal", "rows", "vision_mass"):
            found = getattr(result, name)
            if found is not None:
                wanted, plainly = getattr(exact[place], name), getattr(plain[place], name)
                one = found[head].double().sum() if name == "vision_mass" else found[head]
                assert_error_rule(one, wanted, plainly, rounding=torch.float32)
    for found in result:
        assert found is None or bool(found.isfinite().all()), "a result is not finite"


def _diagonal_work(shape: Teacher) -> Work:
    video, kind = shape.video, dtype()

    def make(seed: int) -> tuple[Tensor, ...]:
        query, key, value = (
            randn(1, shape.heads, parts * video.length, shape.width, seed=3 * seed + i, kind=kind)
            for i, parts in enumerate((1, shape.fold, shape.fold))
        )
        return query, key, flash_attention(query, key, value)[1]

    def ours(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        return diagonal_attention(query, key, lse, video, fold=shape.fold)[0]

    def eager(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        heads = []
        for head in range(query.shape[1]):
            scores = query[0, head] @ key[0, head].T * query.shape[3] ** -0.5
            folded = reference.fold_keys(scores.softmax(-1, dtype=torch.float32), shape.fold)
            heads.append(reference.diagonal(folded[video.vision_slice, video.vision_slice], video))
        return torch.stack(heads)

    @cache
    def wanted() -> tuple[list[Read], list[Read]]:
        query, key, _ = make(0)
        return _exact(shape, (query, key, torch.zeros_like(key)))

    def check(role: str, result: Tensor, inputs: tuple[Any, ...]) -> None:
        for place, head in enumerate(judged(shape.heads)):
            exact, plain = (found[place].diagonal for found in wanted())
            assert exact is not None
            assert plain is not None
            assert_error_rule(result[head], exact, plain, rounding=torch.float32)
        assert bool(result.isfinite().all()), "a result is not finite"

    shape_in = shape.heads * video.length * shape.width * (1 + shape.fold) * kind.itemsize
    entries = shape.heads * video.vision * video.frames
    return Work(
        "diagonal_attention",
        shape.case,
        make,
        {**roles("diagonal_attention", _probe, ours), "eager map": eager},
        check,
        kind,
        video.length,
        moved=shape_in + 4 * (entries + shape.heads * video.length),
        operations=2 * shape.fold * shape.width * entries,
        op="diagonal_attention",
    )


def _probe() -> None:
    """Diagonals of the smallest layer, to learn which backends can run."""
    shape = Teacher("probe", (2, 2, 2), 2, 1, 64)
    query = randn(1, 1, shape.video.length, 64, seed=0, kind=dtype())
    diagonal_attention(query, query, query[..., 0].float(), shape.video)


def _probe_update() -> None:
    shape = Teacher("probe", (2, 2, 2), 2, 1, 64)
    query = randn(1, 1, shape.video.length, 64, seed=0, kind=dtype())
    MotionStatistics(shape.video, 1).update(query, query, query[..., 0].float())


@cache
def _update_backends() -> list[str]:
    return others("motion_statistics_update", _probe_update)


@cache
def _flash_backends() -> list[str]:
    """Further attention kernels of this machine; on a CPU there is only the one torch takes by itself."""
    table = backends.table("flash_attention")
    return [name for name in table if name not in ("cpu_flash", "torch") and not table[name].machine()]


@cache
def _diagonal_backends() -> list[str]:
    return others("diagonal_attention", _probe)


def layer_plans(size: str) -> list[Plan]:
    further = (f"{name} alone" for name in _flash_backends())
    named = ("ours", *map(label, _update_backends()), "flash alone", *further, "eager map")
    return [Plan(shape.case, named, lambda shape=shape: layer_work(shape)) for shape in TEACHERS[size]]


def diagonal_plans(size: str) -> list[Plan]:
    named = ("ours", *map(label, _diagonal_backends()), "eager map")
    return [Plan(shape.case, named, lambda shape=shape: _diagonal_work(shape)) for shape in TEACHERS[size]]
