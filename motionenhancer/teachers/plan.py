"""What a teacher will cost, from the configuration files of its folder alone."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import MODELS
from .frames import nearest_valid_count


@dataclass(frozen=True)
class TeacherPlan:
    """Sizes of a teacher, known without loading it.

    Attributes:
        grid: (F, H, W) vision tokens of a clip of `frames` frames.
        frames: most video frames of a clip.
        size: (height, width) in pixels clips are resized to.
        text_length: tokens a prompt is padded to.
        joint: text and vision tokens attend to each other in one sequence.
        heads: of an attention layer.
        width: of a token's hidden state.
        weights: parameters by part: transformer, transformer_2 where it serves noise levels of its own,
            text_encoder, vae.
    """

    grid: tuple[int, int, int]
    frames: int
    size: tuple[int, int]
    text_length: int
    joint: bool
    heads: int
    width: int
    weights: dict[str, int]

    @property
    def vision(self) -> int:
        """Vision tokens of a clip."""
        return math.prod(self.grid)


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
    from . import read_folder

    folder = Path(path)
    family, _, parts = read_folder(folder)
    transformer = parts.get("transformer") or parts["transformer_2"]
    weights = {part: _parameters(folder / part) for part in MODELS if part in parts}
    plan = _cogvideox if family == "cogvideox" else _wan
    return plan(transformer, parts["vae"], weights, size, frames, parts["pipeline"])


def size_multiple(path: str | Path) -> int:
    """Pixels that height and width of a teacher's clips must be multiples of, from its configuration files.

    Args:
        path: a diffusers folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not JSON or names no such sizes, or the family is not supported.
    """
    from . import FAMILIES, read_model_index

    folder = Path(path)
    family = FAMILIES.get(str(read_model_index(folder).get("_class_name")), ("", ""))[0]
    transformer, vae = _config(_transformer(folder)), _config(folder / "vae")
    try:
        if family == "cogvideox":
            return 2 ** (len(vae["block_out_channels"]) - 1) * transformer["patch_size"]
        if family == "wan":
            return vae.get("scale_factor_spatial", 8) * transformer["patch_size"][1]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"teacher {folder}: its configuration names no sizes ({error})") from error
    raise ValueError(f"teacher {folder}: its family is not supported")


def _cogvideox(
    config: dict[str, Any],
    vae: dict[str, Any],
    weights: dict[str, int],
    size: tuple[int, int] | None,
    frames: int | None,
    pipeline: dict[str, Any],
) -> TeacherPlan:
    from .cogvideox import _LARGEST_1_5

    scale, compression = 2 ** (len(vae["block_out_channels"]) - 1), vae["temporal_compression_ratio"]
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    trained = (config["sample_height"] * scale, config["sample_width"] * scale)
    if patch_t is not None:
        trained = (min(trained[0], _LARGEST_1_5[0]), min(trained[1], _LARGEST_1_5[1]))
    height, width = size or trained
    stride = patch_t or 1
    wanted = frames or config["sample_frames"]
    count = nearest_valid_count(wanted, compression * stride, 1 + compression * (stride - 1))
    grid = (((count - 1) // compression + 1) // stride, height // scale // patch, width // scale // patch)
    heads = config["num_attention_heads"]
    hidden = heads * config["attention_head_dim"]
    return TeacherPlan(
        grid, count, (height, width), config["max_text_seq_length"], True, heads, hidden, weights
    )


def _wan(
    config: dict[str, Any],
    vae: dict[str, Any],
    weights: dict[str, int],
    size: tuple[int, int] | None,
    frames: int | None,
    pipeline: dict[str, Any],
) -> TeacherPlan:
    from .wan import TEXT_LENGTH, trained_clips

    scale, compression = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
    trained_size, trained_frames = trained_clips(pipeline["expand_timesteps"])
    height, width = size or trained_size
    count = nearest_valid_count(frames or trained_frames, compression, 1)
    patches = config["patch_size"]
    latents = ((count - 1) // compression + 1, height // scale, width // scale)
    grid = (latents[0] // patches[0], latents[1] // patches[1], latents[2] // patches[2])
    heads = config["num_attention_heads"]
    hidden = heads * config["attention_head_dim"]
    return TeacherPlan(grid, count, (height, width), TEXT_LENGTH, False, heads, hidden, weights)


def _transformer(folder: Path) -> Path:
    """The folder of a transformer; of two experts, which have one shape, either."""
    first, second = folder / "transformer", folder / "transformer_2"
    return second if second.is_dir() and not first.is_dir() else first


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error


def _parameters(folder: Path) -> int:
    """Numbers in a part's safetensors files, from their headers; other variants of the weights left out."""
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
