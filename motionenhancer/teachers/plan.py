"""Sizes and parameter counts of a teacher, from the configuration files of its folder alone."""

from __future__ import annotations

import importlib
import json
import math
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import read_folder
from .frames import nearest_valid_count

#: Parts of a pipeline that have weights.
MODELS = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "connectors", "vae")
#: The parts that make a text's embeddings.
TEXT_MODELS = ("text_encoder", "text_encoder_2", "connectors")
#: Family → its class, in the module of the family's name.
_CLASSES = {
    "cogvideox": "CogVideoXTeacher",
    "cogvideox_image": "CogVideoXImageTeacher",
    "hunyuan_video": "HunyuanVideoTeacher",
    "hunyuan_video15": "HunyuanVideo15Teacher",
    "ltx": "LTXTeacher",
    "ltx2": "LTX2Teacher",
    "wan": "WanTeacher",
}


@dataclass(frozen=True)
class TeacherPlan:
    """Sizes of a teacher, known without loading it.

    Attributes:
        frames: maximum number of video frames of a clip.
        size: (height, width) in pixels of resized clips.
        scale: number of pixels per latent along a side.
        compression: number of video frames per latent frame; the first latent frame is one video frame.
        patch: (frames, height, width) of a vision token, in latents.
        text_length: number of tokens of a padded prompt.
        joint: whether text and vision tokens attend to each other in one sequence.
        heads, layers: numbers in one evaluation; with two experts, of one expert.
        width: width of a token's hidden state.
        text_first: whether text comes before vision in the joint sequence.
        fixed: whether clips must have exactly this size and number of frames.
        embedded_guidance: whether guidance is an input of the model; then no empty prompt is evaluated.
        weights: part of the pipeline → number of parameters. Only `plan_teacher` counts them.
    """

    frames: int
    size: tuple[int, int]
    scale: int
    compression: int
    patch: tuple[int, int, int]
    text_length: int
    joint: bool
    heads: int
    layers: int
    width: int
    text_first: bool = True
    embedded_guidance: bool = False
    fixed: bool = False
    weights: dict[str, int] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this number of pixels."""
        return self.scale * self.patch[1]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, H, W) vision tokens of a clip of `frames` frames."""
        latents = (self.frames - 1) // self.compression + 1
        height, width = (pixels // self.multiple for pixels in self.size)
        return latents // self.patch[0], height, width

    @property
    def vision(self) -> int:
        """Vision tokens of a clip."""
        return math.prod(self.grid)

    def valid_frames(self, count: int) -> int:
        """The nearest valid number of video frames: 4m+1, or 8m+5 with a temporal patch of two."""
        patch = self.patch[0]
        if self.fixed:
            return self.frames
        return nearest_valid_count(count, self.compression * patch, 1 + self.compression * (patch - 1))

    def fitted(self, size: tuple[int, int] | None, frames: int | None) -> TeacherPlan:
        """The plan for another size and number of frames; None keeps the values of the training.

        Raises:
            ValueError: height or width is not a positive multiple of `multiple` pixels.
        """
        size = self.size if size is None else size
        step = self.multiple
        if len(size) != 2 or any(not isinstance(n, int) or n < step or n % step for n in size):
            raise ValueError(f"size must be (height, width), multiples of {step} pixels, got {size}")
        if self.fixed and (size != self.size or frames not in (None, self.frames)):
            raise ValueError(
                f"size and frames must be {self.size} and {self.frames}, as the teacher's learnt positions "
                f"have this size, got {size} and {frames or self.frames}"
            )
        return replace(self, size=size, frames=self.valid_frames(frames or self.frames))


def teacher_class(family: str) -> Any:
    """The class of a family; this imports its module."""
    return getattr(importlib.import_module(f".{family}", __package__), _CLASSES[family])


def plan_teacher(
    path: str | Path, *, size: tuple[int, int] | None = None, frames: int | None = None
) -> TeacherPlan:
    """Read a diffusers folder's configuration files and the headers of its weights; no weight is read.

    Args:
        path, size, frames: as given to `load_teacher`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not JSON, the family is not supported, or a field is unknown.

    Example:
        >>> plan_teacher("runs/toy/teacher").grid          # doctest: +SKIP
        (5, 8, 8)
    """
    family, parts = read_folder(path)
    plan = teacher_class(family).sizes(parts).fitted(size, frames)
    return replace(plan, weights={part: _parameters(Path(path, part)) for part in MODELS if part in parts})


def size_multiple(path: str | Path) -> int:
    """The number of pixels of which a clip's height and width must be multiples, from configuration files.

    Raises:
        FileNotFoundError, ValueError: as from `plan_teacher`.
    """
    family, parts = read_folder(path)
    return teacher_class(family).sizes(parts).multiple


def _parameters(folder: Path) -> int:
    """Count the parameters in a part's safetensors files, from their headers; other variants do not count."""
    count, files = 0, sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no safetensors weights in it")
    for file in files:
        if any(f".{variant}." in file.name or f".{variant}-" in file.name for variant in ("fp16", "bf16")):
            continue
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        count += sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
    return count
