"""What all families share: loading a diffusers folder, and text with the characters of its tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .plan import MODELS
from .protocol import TextEncoding
from .whole import whole_weights


def experts(pipeline: Any) -> list[Any]:
    """The transformers of a pipeline: one, or one for high and one for low noise levels."""
    named = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in named if model is not None]


def load_pipeline(
    cls: Any,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    unused: Iterable[str],
    host: Iterable[str],
) -> Any:
    """A frozen diffusers pipeline from a folder, without `unused` parts; `host` parts stay on the CPU."""
    with whole_weights():
        pipeline = cls.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, **dict.fromkeys(unused)
        )
    pipeline.set_progress_bar_config(disable=True)
    for name in MODELS:
        module = getattr(pipeline, name, None)
        if module is not None:
            module.requires_grad_(False).eval().to("cpu" if name in host else device)
    if not pipeline.tokenizer.is_fast:
        raise ValueError(f"teacher {path}: its tokenizer gives no character offsets; a fast one is needed")
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
