"""What a teacher is and costs, from the configuration files of its folder alone."""

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
        frames: most video frames of a clip.
        size: (height, width) in pixels clips are resized to.
        scale: pixels across a latent.
        compression: video frames of a latent frame; the first latent frame is one video frame.
        patch: (frames, height, width) in latents of a vision token.
        text_length: tokens a prompt is padded to.
        joint: text and vision tokens attend to each other in one sequence.
        heads, layers: of one evaluation: of one expert, where there are two.
        width: of a token's hidden state.
        text_first: in one sequence, text stands before vision.
        fixed: clips have this size and count and no other.
        embedded_guidance: guidance is an input of the model: no empty prompt is evaluated beside the text.
        weights: parameters by part of the pipeline. Only `plan_teacher` counts them.
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
        """Pixels that height and width must be multiples of."""
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
        """The nearest number of video frames the model takes: 4m+1, and 8m+5 with a temporal patch of two."""
        patch = self.patch[0]
        if self.fixed:
            return self.frames
        return nearest_valid_count(count, self.compression * patch, 1 + self.compression * (patch - 1))

    def fitted(self, size: tuple[int, int] | None, frames: int | None) -> TeacherPlan:
        """The same model for clips of another size and count; None leaves what it was trained on.

        Raises:
            ValueError: the size is not positive multiples of `multiple` pixels.
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
    """The class of a family; its module is imported now."""
    return getattr(importlib.import_module(f".{family}", __package__), _CLASSES[family])


def plan_teacher(
    path: str | Path, *, size: tuple[int, int] | None = None, frames: int | None = None
) -> TeacherPlan:
    """Read a diffusers folder's configuration files and the headers of its weights; no weight is read.

    Args:
        path, size, frames: as given to `load_teacher`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not JSON, the family is not supported, or a field is not understood.

    Example:
        >>> plan_teacher("runs/toy/teacher").grid          # doctest: +SKIP
        (5, 8, 8)
    """
    family, parts = read_folder(path)
    plan = teacher_class(family).sizes(parts).fitted(size, frames)
    return replace(plan, weights={part: _parameters(Path(path, part)) for part in MODELS if part in parts})


def size_multiple(path: str | Path) -> int:
    """Pixels that height and width of a teacher's clips must be multiples of, from its configuration files.

    Raises:
        FileNotFoundError, ValueError: as from `plan_teacher`.
    """
    family, parts = read_folder(path)
    return teacher_class(family).sizes(parts).multiple


def _parameters(folder: Path) -> int:
    """Count the numbers in a part's safetensors files, from their headers; other variants do not count."""
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
