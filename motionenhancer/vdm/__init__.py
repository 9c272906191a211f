"""Teachers: frozen video diffusion transformers, one file a family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .base import AttentionReader, Teacher, TextEncoding, VideoLatents
from .identity import teacher_id
from .inversion import Reconstruction, invert, reconstruct, roundtrip_error
from .schedule import Schedule, make_schedule

__all__ = [
    "AttentionReader",
    "Reconstruction",
    "Schedule",
    "Teacher",
    "TextEncoding",
    "VideoLatents",
    "invert",
    "load_teacher",
    "make_schedule",
    "reconstruct",
    "roundtrip_error",
    "teacher_id",
]


def _load_cogvideox(path: Path, device: torch.device, dtype: torch.dtype) -> Teacher:
    from .cogvideox import CogVideoXTeacher

    return CogVideoXTeacher.from_pretrained(path, device=device, dtype=dtype)


#: `_class_name` in the folder's model_index.json → loader. A new family is one file and one line here.
FAMILIES: dict[str, Callable[[Path, torch.device, torch.dtype], Teacher]] = {
    "CogVideoXPipeline": _load_cogvideox,
    "CogVideoXVideoToVideoPipeline": _load_cogvideox,
}


def load_teacher(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Teacher:
    """Load a frozen teacher from an ordinary diffusers folder.

    Args:
        path: folder with `model_index.json`, as `save_pretrained` writes it. Nothing is downloaded.
        device: default the first CUDA device, else the CPU.
        dtype: default bfloat16 on CUDA, float32 on the CPU.

    Raises:
        FileNotFoundError: the folder or its `model_index.json` is missing.
        ValueError: the pipeline class is not a supported family.

    Example:
        >>> teacher = load_teacher("runs/toy/teacher")          # doctest: +SKIP
    """
    index = read_model_index(path)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"teacher {path}: pipeline class {name!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    return FAMILIES[name](Path(path), where, kind)


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
