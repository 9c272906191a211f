"""What a teacher that stays in memory beside a student costs: planned, and measured."""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arguments import PriorArguments
from ..extraction.estimate import readable
from ..prior import PriorSettings
from ..vdm.plan import plan_teacher

BEFORE = "before the first step"
#: Video frames that a family's VAE encodes at a time.
_VAE_FRAMES = {"cogvideox": 9, "wan": 4}


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes that a teacher takes while a student trains.

    Attributes:
        weights: on the teacher's device, by part.
        host: of these, in the CPU's memory instead: an offloaded text encoder.
        reading: least that reading a clip takes beside them: its sums and one layer's hidden states.
        encoding: least that the VAE takes: its first layer's input and output, of the frames it does at once.
            The peak is many times that and depends on the device's convolutions: 23 times with the toy's.
        place: "beside the student", "on ranks of its own", or "before the first step".
    """

    weights: dict[str, int]
    host: int
    reading: int
    encoding: int
    place: str

    @property
    def total(self) -> int:
        """On the teacher's device, at least: clips are encoded and read one after the other."""
        return sum(self.weights.values()) + max(self.reading, self.encoding)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.weights.items())
        host = f", {readable(self.host)} in the CPU's memory" if self.host else ""
        return (
            f"teacher, {self.place}: at least {readable(self.total)}: "
            f"weights {readable(sum(self.weights.values()))} ({parts}){host}, at least "
            f"{readable(self.reading)} to read a clip and {readable(self.encoding)} to encode it, "
            "one after the other (least amounts, of single layers: encoding takes many times its own at its "
            "peak, which only a run measures)"
        )


def teacher_memory(
    prior: PriorArguments,
    settings: PriorSettings,
    device: torch.device | str,
    *,
    place: str = "beside the student",
    words: int | None = None,
) -> TeacherMemory:
    """Plan the memory of a teacher from its folder's configuration files; no weight is read.

    Args:
        prior: which teacher, loaded how.
        settings: of the priors.
        device: where it runs.
        place: where or when, in words.
        words: tokens of the longest text; by default as many as the teacher takes.

    Raises:
        ValueError, OSError: the teacher's folder lacks files, or is of a family that is not supported.
    """
    assert prior.teacher is not None
    options = prior.identity(device)
    plan = plan_teacher(prior.teacher, size=options["size"], frames=options["frames"])
    width = options["dtype"].itemsize
    weights, host = {part: count * width for part, count in plan.weights.items()}, 0
    if prior.text_cache is not None and place != BEFORE:
        weights.pop("text_encoder")
    elif prior.offload_text_encoder and torch.device(device).type != "cpu":
        host = weights.pop("text_encoder")
    batch = 1
    if settings.mode == "reconstruct":
        guided = settings.guidance_scale != 1.0 and not prior.split_batch
        batch = (2 if guided else 1) * (2 if settings.memory else 1)
    rows = plan.text_length if words is None else words
    sampled = 0 if settings.sampled_rows == "all" else int(settings.sampled_rows)
    sums = 4 * plan.heads * plan.vision * (rows + sampled + plan.grid[0])
    # The stream, its normalised copy, and a feed-forward layer of four times the width.
    states = 6 * batch * (plan.vision + (plan.text_length if plan.joint else 0)) * plan.width * width
    config = json.loads((Path(prior.teacher) / "vae" / "config.json").read_text())
    height, across = (math.ceil(n / 2) if prior.vae_tiling else n for n in plan.size)
    frames = min(_VAE_FRAMES["cogvideox" if plan.joint else "wan"], plan.frames)
    channels = config.get("block_out_channels", [config.get("base_dim", 0)])[0]
    # Some VAEs first fold patches of pixels into channels.
    patch = (config.get("patch_size") or 1) ** 2
    encoding = (channels + 3 * patch) * frames * (height * across // patch) * width
    return TeacherMemory(weights, host, sums + states, encoding, place)


def measured_memory() -> dict[str, Any]:
    """The most memory this process has held so far: of its GPU's allocator, else of the whole process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": "cpu", "peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
