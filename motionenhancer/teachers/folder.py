"""What all families share: loading a diffusers folder, and text with the characters of its tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .identity import teacher_id
from .protocol import TextEncoding
from .whole import whole_weights

#: Parts of a pipeline that have weights.
MODELS = ("transformer", "transformer_2", "text_encoder", "vae")


@dataclass(frozen=True)
class LoadOptions:
    """How a teacher is loaded; see `load_teacher`, which fills in device and dtype."""

    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int] | None = None
    frames: int | None = None
    vae_tiling: bool = False
    offload_text_encoder: bool = False
    compile: bool | str = False
    split_batch: bool = False
    text_encoder: bool = True

    def id(self, path: Path) -> str:
        """The teacher's id under these options."""
        return teacher_id(
            path, dtype=self.dtype, size=self.size, frames=self.frames, vae_tiling=self.vae_tiling
        )


def experts(pipeline: Any) -> list[Any]:
    """The transformers of a pipeline: one, or one for high and one for low noise levels."""
    named = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in named if model is not None]


def load_pipeline(
    cls: Any, path: Path, options: LoadOptions, *, blocks: str, unused: Iterable[str] = ()
) -> Any:
    """A frozen diffusers pipeline from a folder on disk, each part where it belongs.

    Args:
        cls: the pipeline's class.
        path: the folder.
        options: how to load it.
        blocks: name of the transformer's list of blocks, which are what gets compiled.
        unused: parts to leave out.
    """
    left = set(unused) | (set() if options.text_encoder else {"text_encoder"})
    with whole_weights():
        pipeline = cls.from_pretrained(
            path, dtype=options.dtype, local_files_only=True, use_safetensors=True, **dict.fromkeys(left)
        )
    pipeline.set_progress_bar_config(disable=True)
    for name in MODELS:
        module = getattr(pipeline, name, None)
        if module is None:
            continue
        module.requires_grad_(False)
        module.eval()
        stays = name == "text_encoder" and options.offload_text_encoder
        module.to(torch.device("cpu") if stays else options.device)
    if not pipeline.tokenizer.is_fast:
        raise ValueError(f"teacher {path}: its tokenizer gives no character offsets; a fast one is needed")
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    if options.compile:
        backend = {"backend": options.compile} if isinstance(options.compile, str) else {}
        for block in (b for model in experts(pipeline) for b in model.get_submodule(blocks)):
            block.compile(**backend)
    return pipeline


def tokenize(tokenizer: Any, text: str, length: int) -> tuple[Any, TextEncoding]:
    """A prompt padded to `length` → the tokenizer's tensors and the encoding, its `embeds` still empty."""
    encoded = tokenizer(
        text,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    ids, mask = encoded["input_ids"][0], encoded["attention_mask"][0].bool()
    real = mask & ~encoded["special_tokens_mask"][0].bool()
    positions = real.nonzero()[:, 0].tolist()
    if positions != list(range(len(positions))):
        raise ValueError("the teacher's tokenizer must put a prompt's tokens first and pad on the right")
    spans = tuple((int(a), int(b)) for a, b in encoded["offset_mapping"][0][real].tolist())
    full = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = ids[real].tolist()
    tokens = tuple(tokenizer.convert_ids_to_tokens(pieces))
    # A special piece in a text is the unknown one, or one whose name is written out. Before a piece that it
    # knows only without a space, SentencePiece puts a space as a token of its own.
    special = _special_ids(tokenizer)
    words = tuple(
        i
        for i, (piece, token, span) in enumerate(zip(pieces, tokens, spans, strict=True))
        if piece not in special and token.replace("▁", " ").strip() and text[slice(*span)].strip()
    )
    return encoded, TextEncoding(torch.empty(0), tokens, spans, text, words, max(0, full - len(spans)))


@functools.lru_cache(maxsize=4)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer's special pieces, and of its model's unknown one if that is not among them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    unknown = model.get("unk_id")
    if unknown is None and model.get("unk_token") is not None:
        unknown = tokenizer.convert_tokens_to_ids(model["unk_token"])
    return frozenset(tokenizer.all_special_ids) | ({unknown} if unknown is not None else set())


def valid_size(size: tuple[int, int], multiple: int, name: str = "size") -> tuple[int, int]:
    """Raise unless height and width are positive multiples of `multiple` pixels."""
    if len(size) != 2 or any(not isinstance(n, int) or n < multiple or n % multiple for n in size):
        raise ValueError(f"{name} must be (height, width), multiples of {multiple} pixels, got {size}")
    return size


def check_latents(found: Sequence[int], size: tuple[int, int], scale: int) -> None:
    """Raise where tiled encoding gave latents of another size: tiles and clip did not match."""
    wanted = (size[0] // scale, size[1] // scale)
    if tuple(found) != wanted:
        raise ValueError(
            f"the VAE turned {size[0]}x{size[1]} pixels into {tuple(found)} latents, not {wanted}: "
            "clips of this size cannot be encoded in tiles"
        )
