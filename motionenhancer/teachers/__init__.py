"""Teachers: frozen video diffusion transformers, one file a family."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from ..hub import model_folder
from .folder import LoadOptions
from .identity import teacher_id
from .inversion import Reconstruction, invert, reconstruct, renoise, roundtrip_error
from .known import Parts, check_folder
from .protocol import AttentionReader, Teacher, TextEncoding, VideoLatents
from .schedule import DiffusionSchedule, FlowSchedule, Schedule, make_schedule

__all__ = [
    "AttentionReader",
    "DiffusionSchedule",
    "FlowSchedule",
    "Reconstruction",
    "Schedule",
    "Teacher",
    "TextEncoding",
    "VideoLatents",
    "invert",
    "load_teacher",
    "make_schedule",
    "reconstruct",
    "renoise",
    "roundtrip_error",
    "teacher_dtype",
    "teacher_id",
]

#: `_class_name` in model_index.json → (module, class). A new family is one file and one line here.
FAMILIES = {
    "CogVideoXPipeline": ("cogvideox", "CogVideoXTeacher"),
    "CogVideoXVideoToVideoPipeline": ("cogvideox", "CogVideoXTeacher"),
    "WanPipeline": ("wan", "WanTeacher"),
}


def load_teacher(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    vae_tiling: bool = False,
    offload_text_encoder: bool = False,
    compile: bool | str = False,
    split_batch: bool = False,
    text_encoder: bool = True,
) -> Teacher:
    """Load a frozen teacher from an ordinary diffusers folder.

    Args:
        path: folder with `model_index.json`, as `save_pretrained` writes it, or a Hub id; see
            `hub.model_folder`.
        device: default the first CUDA device, else the CPU.
        dtype: default bfloat16 on CUDA, float32 on the CPU.
        size: (height, width) in pixels clips are resized to; default what the model was trained on.
        frames: most frames of a clip; default what the model was trained on.
        vae_tiling: encode large frames in overlapping tiles; less memory, slightly other latents.
        offload_text_encoder: leave the text encoder on the CPU.
        compile: compile the transformer's blocks with `torch.compile`; a string names the backend.
        split_batch: evaluate guidance's two texts one after the other. It is switched on by itself when
            memory runs out.
        text_encoder: False leaves the text encoder out; all texts must then come from a cache.

    Raises:
        FileNotFoundError: the folder or its `model_index.json` is missing.
        ValueError: the pipeline class is not a supported family, a field of a configuration is not
            understood, or a size or frame count does not fit.

    Example:
        >>> teacher = load_teacher("runs/toy/teacher")          # doctest: +SKIP
    """
    path = model_folder(path, "teacher")
    module, cls, parts = read_folder(path)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    family = getattr(importlib.import_module(f".{module}", __package__), cls)
    options = LoadOptions(
        where,
        dtype or teacher_dtype(where),
        size,
        frames,
        vae_tiling,
        offload_text_encoder,
        compile,
        split_batch,
        text_encoder,
    )
    return family.from_pretrained(path, options, parts)


def read_folder(path: str | Path) -> tuple[str, str, Parts]:
    """The family of a diffusers folder and the configurations of its parts, all of them understood.

    Returns:
        The family's module, its class, and its parts as `known.check_folder` gives them.

    Raises:
        FileNotFoundError: the folder or one of its configurations is missing.
        ValueError: the pipeline class is not a supported family, or a field is not understood.
    """
    index = read_model_index(path)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"teacher {path}: pipeline class {name!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    module, cls = FAMILIES[name]
    return module, cls, check_folder(Path(path), module, index)


def teacher_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype a teacher runs in when none is named."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def read_model_index(path: str | Path) -> dict[str, Any]:
    """The parsed `model_index.json` of a diffusers folder.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: the file is not JSON.
    """
    folder = Path(path)
    file = folder / "model_index.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"teacher {folder}: no such folder; give a diffusers folder on disk")
    if not file.is_file():
        raise FileNotFoundError(
            f"teacher {folder}: no model_index.json in it; give the folder that save_pretrained wrote"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
