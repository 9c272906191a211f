"""Shared by all families: loading a diffusers folder, and tokenising with character ranges."""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import read_json, too_deep
from ..weights import load_whole
from .plan import MODELS
from .protocol import TextEncoding

_SWITCH = "FSDP_CPU_RAM_EFFICIENT_LOADING"
#: The switch is global to the process: one load at a time.
_lock = threading.RLock()


def blocks(pipeline: Any, names: str) -> Iterator[Any]:
    """The blocks in the named lists of a pipeline's transformers; names are separated by spaces."""
    for part in ("transformer", "transformer_2"):
        model: Any = getattr(pipeline, part, None)
        for name in names.split() if model is not None else ():
            yield from model.get_submodule(name)


@contextmanager
def whole_weights() -> Iterator[None]:
    """In this context, transformers loads models as if no engine were configured.

    Under ZeRO-3, `from_pretrained` splits every model over the processes. Under FSDP with RAM-efficient
    loading, only the first process gets weights. No engine would ever gather a teacher's text encoder, so it
    must be loaded without both.
    """
    from transformers.integrations import deepspeed

    with _lock:
        held = deepspeed._hf_deepspeed_config_weak_ref
        before = os.environ.get(_SWITCH)
        deepspeed.unset_hf_deepspeed_config()
        os.environ[_SWITCH] = "false"
        try:
            yield
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = held
            if before is None:
                del os.environ[_SWITCH]
            else:
                os.environ[_SWITCH] = before


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
    parts: dict[str, Any] = dict.fromkeys(unused)
    named = read_json(path / "model_index.json")
    with whole_weights():
        for name in MODELS:
            if name in named and name not in parts and named[name][1] is not None:
                parts[name] = load_whole(_class_of(*named[name]), path / name, dtype=dtype)
        try:
            pipeline = cls.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
            )
        except RecursionError as error:
            said = f"{too_deep(path)}: not valid JSON (nested too deeply)" if too_deep(path) else str(path)
            raise ValueError(said) from error
    pipeline.set_progress_bar_config(disable=True)
    for name in MODELS:
        module = getattr(pipeline, name, None)
        if module is not None:
            module.requires_grad_(False).eval().to("cpu" if name in host else device)
    if not pipeline.tokenizer.is_fast:
        raise ValueError(f"teacher {path}: its tokenizer gives no character offsets; a fast one is needed")
    return pipeline


def _class_of(library: str, name: str) -> Any:
    """The class of a part, of a library or of a folder of diffusers' pipelines."""
    own = library not in ("diffusers", "transformers")
    return getattr(importlib.import_module(f"diffusers.pipelines.{library}" if own else library), name)


def tokenize(
    tokenizer: Any,
    text: str,
    length: int,
    *,
    template: tuple[str, str] = ("", ""),
    crop: int = 0,
    add_special_tokens: bool = True,
    padding_side: str | None = None,
) -> tuple[Any, TextEncoding]:
    """A prompt padded on the right → the tokenizer's tensors and the encoding, its `embeds` still empty.

    Args:
        tokenizer: a fast one.
        text: the prompt.
        length: number of tokens after padding and cutting, without the tokens of `crop`.
        template: text that the model reads before and after the prompt.
        crop: number of template tokens at the start that the model drops.
        add_special_tokens: whether the tokenizer adds its own special tokens.
        padding_side: "right" for a tokenizer that pads on the left, and a model that moves tokens first.

    Raises:
        ValueError: the tokenizer pads on the left, or the prompt starts before `crop`.
    """
    before, after = template
    whole, options = before + text + after, {"add_special_tokens": add_special_tokens}
    encoded = tokenizer(
        whole,
        padding="max_length",
        max_length=crop + length,
        padding_side=padding_side,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
        **options,
    )
    ids, mask = encoded["input_ids"][0], encoded["attention_mask"][0].bool()
    offsets = encoded["offset_mapping"][0]
    real = mask & ~encoded["special_tokens_mask"][0].bool()

    def inside(start: Any, end: Any) -> Any:
        return (end > len(before)) & (start < len(before) + len(text))

    if before or after:
        real &= inside(*offsets.unbind(-1))
        cut = tokenizer(whole, return_offsets_mapping=True, verbose=False, **options)["offset_mapping"]
        full = sum(bool(inside(*span)) for span in cut)
    else:
        full = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    positions = (real.nonzero()[:, 0] - crop).tolist()
    if not mask[: int(mask.sum())].all():
        raise ValueError("the teacher's tokenizer must put a prompt's tokens first and pad on the right")
    if positions and positions[0] < 0:
        raise ValueError(
            f"the teacher's tokenizer makes {positions[0] + crop} tokens of the template before a prompt, "
            f"but the model skips the first {crop}: the model was made for another tokenizer"
        )
    spans = tuple(
        (max(0, int(a) - len(before)), min(len(text), int(b) - len(before)))
        for a, b in offsets[real].tolist()
    )
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
    truncated = max(0, full - len(spans))
    return encoded, TextEncoding(torch.empty(0), tokens, spans, text, words, truncated, tuple(positions))


@functools.lru_cache(maxsize=4)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer's special pieces, and of its model's unknown one if that is not among them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    unknown = model.get("unk_id")
    if unknown is None and model.get("unk_token") is not None:
        unknown = tokenizer.convert_tokens_to_ids(model["unk_token"])
    return frozenset(tokenizer.all_special_ids) | ({unknown} if unknown is not None else set())
