"""What an extraction will cost, before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..prior import PriorSettings, check_guidance
from ..vdm import read_folder
from ..vdm.known import boundary_of
from ..vdm.plan import TeacherPlan, plan_teacher
from ..vdm.schedule import check_experts, check_level, check_steps


@dataclass(frozen=True)
class Estimate:
    """Cost of an extraction.

    Attributes:
        stored: priors that the store holds already.
        missing: priors to make.
        evaluations: of the transformer for all missing ones, counted per batch row.
        prior_bytes: most that the missing priors' attention takes in the store.
        weight_bytes: memory of the teacher's weights, by part.
        work_bytes: least memory beside the weights: the sums of one clip, and one layer's hidden states; what
            the VAE takes is not in it.
        plan: the teacher's sizes.
    """

    stored: int
    missing: int
    evaluations: int
    prior_bytes: int
    weight_bytes: dict[str, int]
    work_bytes: int
    plan: TeacherPlan

    def __str__(self) -> str:
        grid = "×".join(map(str, self.plan.grid))
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.weight_bytes.items())
        return "\n".join(
            [
                f"priors: {self.stored} stored, {self.missing} to make; "
                f"clips of up to {self.plan.frames} frames become a grid of {grid}",
                f"evaluations of the transformer: {self.evaluations:,}",
                f"disk: at most {readable(self.prior_bytes)} of attention, a few KB a prior for the rest",
                f"memory a process: weights {readable(sum(self.weight_bytes.values()))} ({parts}), "
                f"and at least {readable(self.work_bytes)} to work in, besides what the VAE takes to encode "
                "a clip, which only a run measures",
            ]
        )


def readable(size: float) -> str:
    """Bytes for people: `readable(1536)` is "1.5 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def evaluations_a_prior(settings: PriorSettings) -> int:
    """Transformer evaluations of one prior, counted per batch row."""
    if settings.mode == "renoise":
        return 1
    return settings.steps * (1 + _rows(settings, split=False))


def check_settings(settings: PriorSettings, teacher: str | Path) -> None:
    """See that a teacher is understood and has what settings ask for, from its configuration files.

    Raises:
        ValueError: a field of a configuration is not understood; the steps do not divide its training
            timesteps, or the noise level is none of them; no expert serves a level, or there is no second one
            for a guidance of its own.
        OSError: the folder or its files are missing.
    """
    _, _, parts = read_folder(teacher)
    total, boundary = parts["scheduler"]["num_train_timesteps"], boundary_of(parts)
    check_guidance(settings, boundary)
    if settings.mode == "renoise":
        try:
            check_level(settings.noise_level, total)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        levels: Sequence[float] = (settings.noise_level,)
    else:
        check_steps(settings.steps, total)
        # The noisiest of them; where it has an expert, all have.
        levels = (total,)
    check_experts(levels, boundary, "transformer" in parts)


def estimate(
    missing: Iterable[str],
    stored: int,
    settings: PriorSettings,
    teacher: str | Path,
    *,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    split_batch: bool = False,
) -> Estimate:
    """Work out what making priors takes. Only the tokenizer and configuration files are read.

    Args:
        missing: the text of every prior to make; not kept.
        stored: how many priors are there already.
        settings: of the extraction.
        teacher, dtype, size, frames, split_batch: as given to `load_teacher`.

    Raises:
        ValueError, OSError: the teacher's folder is missing files, or of a family that is not supported.
    """
    plan = plan_teacher(teacher, size=size, frames=frames)
    count = longest = rows = 0
    tokenizer: Any = None
    texts = iter(missing)
    while some := list(islice(texts, 256)):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(Path(teacher) / "tokenizer", local_files_only=True)
        most = plan.text_length - tokenizer.num_special_tokens_to_add()
        count += len(some)
        for tokens in map(len, tokenizer(some, add_special_tokens=False)["input_ids"]):
            longest = max(longest, min(tokens, most))
            rows += max(1, math.floor(settings.token_ratio * min(tokens, most) + 0.5))
    batch = 1 if settings.mode == "renoise" else _rows(settings, split=split_batch)
    sampled = 0 if settings.sampled_rows == "all" else int(settings.sampled_rows)
    length = plan.vision + (plan.text_length if plan.joint else 0)
    sums = 4 * plan.heads * plan.vision * (longest + sampled + plan.grid[0])
    # The stream, its normalised copy, and a feed-forward layer of four times the width.
    states = 6 * batch * length * plan.width * dtype.itemsize
    return Estimate(
        stored=stored,
        missing=count,
        evaluations=count * evaluations_a_prior(settings),
        prior_bytes=2 * plan.vision * rows,
        weight_bytes={part: count * dtype.itemsize for part, count in plan.weights.items()},
        work_bytes=(sums + states) if count else 0,
        plan=plan,
    )


def _rows(settings: PriorSettings, *, split: bool) -> int:
    """Batch rows of one evaluation of a reconstruction."""
    texts = 1 if split or settings.guidance_scale == 1.0 else 2
    return texts * (2 if settings.memory else 1)
