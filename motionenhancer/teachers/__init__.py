"""Teachers: frozen video diffusion transformers, one file for each family."""

from __future__ import annotations

from pathlib import Path

import torch

from ..hub import model_folder
from .config import read_folder
from .folder import blocks, load_pipeline
from .identity import teacher_id
from .inversion import invert, reconstruct, renoise, roundtrip_error
from .plan import MODELS, TEXT_MODELS, teacher_class
from .protocol import AttentionReader, TextEncoding, VideoLatents
from .schedule import DiffusionSchedule, FlowSchedule, Schedule, make_schedule
from .teacher import Teacher
from .text_cache import TextCache

__all__ = [
    "AttentionReader",
    "DiffusionSchedule",
    "FlowSchedule",
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
    texts: TextCache | None = None,
) -> Teacher:
    """Load a frozen teacher from an ordinary diffusers folder.

    Args:
        path: folder with `model_index.json`, as `save_pretrained` writes it, or a Hub id; see
            `hub.model_folder`.
        device: default: the first CUDA device, else the CPU.
        dtype: default: bfloat16 on CUDA, float32 on the CPU.
        size: (height, width) in pixels of resized clips; default: the size of the model's training.
        frames: maximum number of frames of a clip; default: the number of the model's training.
        vae_tiling: encode large frames in overlapping tiles; less memory, slightly different latents.
        offload_text_encoder: keep the text encoder on the CPU.
        compile: compile the transformer's blocks with `torch.compile`; a string names the backend.
        split_batch: evaluate the two texts of guidance one after the other. It is switched on automatically
            when memory runs out.
        text_encoder: False leaves the text encoder out; all texts must then come from `texts`.
        texts: a cache of text embeddings.

    Raises:
        FileNotFoundError: the folder or its `model_index.json` is missing.
        ValueError: the pipeline class is not a supported family, a configuration field is unknown, or a size
            or frame count does not fit.

    Example:
        >>> teacher = load_teacher("runs/toy/teacher")          # doctest: +SKIP
    """
    path = model_folder(path, "teacher")
    family, parts = read_folder(path)
    cls = teacher_class(family)
    plan = cls.sizes(parts).fitted(size, frames)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or teacher_dtype(where)
    unused = {name for name in MODELS if name in parts["pipeline"] and name not in parts}
    unused |= cls.unused & set(parts["pipeline"])
    encoders = set(TEXT_MODELS) & set(parts)
    pipeline = load_pipeline(
        cls.pipeline_class,
        Path(path),
        dtype,
        where,
        unused=unused if text_encoder else unused | encoders,
        host=encoders if offload_text_encoder else (),
    )
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if compile:
        backend = {"backend": compile} if isinstance(compile, str) else {}
        for block in blocks(pipeline, cls.blocks):
            block.compile(**backend)
    named = teacher_id(path, dtype=dtype, size=size, frames=frames, vae_tiling=vae_tiling)
    return cls(pipeline, parts, plan, named, device=where, dtype=dtype, split_batch=split_batch, texts=texts)


def teacher_dtype(device: torch.device | str) -> torch.dtype:
    """The default dtype of a teacher."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
