"""A teacher's text embeddings on disk: its text encoder need not be in memory while a student trains."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import whole_file
from .identity import teacher_id
from .protocol import Teacher, TextEncoding, VideoLatents


def encoder_id(teacher: str | Path, dtype: torch.dtype) -> str:
    """Digest of a diffusers folder's text encoder and tokenizer and of the dtype they run in.

    Raises:
        FileNotFoundError: the folder has no text encoder or no tokenizer.
    """
    parts = [teacher_id(Path(teacher) / part, dtype=dtype) for part in ("text_encoder", "tokenizer")]
    model = (Path(teacher) / "model_index.json").read_bytes()
    return hashlib.sha256("\0".join(parts).encode() + model).hexdigest()[:32]


@dataclass(frozen=True)
class TextCache:
    """A folder of text embeddings, one safetensors file a text, named by the text and its encoder.

    Files appear whole, by rename. One that cannot be read counts as missing and is written anew.

    Attributes:
        folder: created on the first write.
        encoder: from `encoder_id`.
    """

    folder: Path
    encoder: str

    def path(self, text: str) -> Path:
        key = hashlib.sha256(f"{self.encoder}\0{text}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, text: str) -> TextEncoding | None:
        """The encoding of a text, `embeds` on the CPU in the encoder's dtype; None where there is none."""
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                embeds, metadata = file.get_tensor("embeds"), file.metadata() or {}
            about = json.loads(metadata["text_encoding"])
            spans = tuple((a, b) for a, b in about["spans"])
            embeds = F.pad(embeds, (0, 0, 0, about["length"] - embeds.shape[1]))
            tokens, words = tuple(about["tokens"]), tuple(about["words"])
            return TextEncoding(embeds, tokens, spans, text, words, about["truncated"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
            return None

    def write(self, encoding: TextEncoding) -> Path:
        """Store an encoding; trailing rows of zeros, such as masked padding, are left out of the file."""
        target = self.path(encoding.text)
        embeds = encoding.embeds.cpu()
        used = embeds[0].any(-1).nonzero()
        rows = int(used[-1]) + 1 if len(used) else 0
        about = {
            "tokens": encoding.tokens,
            "spans": encoding.spans,
            "truncated": encoding.truncated,
            "words": encoding.words,
            "length": embeds.shape[1],
        }
        body = save({"embeds": embeds[:, :rows].contiguous()}, {"text_encoding": json.dumps(about)})
        with whole_file(target) as temporary:
            temporary.write_bytes(body)
        return target


class CachedTextTeacher:
    """A teacher whose texts come from a cache first; in all else the teacher it is given."""

    def __init__(self, teacher: Teacher, cache: TextCache) -> None:
        self._teacher, self._cache = teacher, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What a teacher learns while it runs, such as to split its batches, it must keep.
        if name in ("_teacher", "_cache"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._teacher, name, value)

    def encode_video(self, frames: Any) -> VideoLatents:
        return self._teacher.encode_video(frames)

    def encode_text(self, text: str) -> TextEncoding:
        """As the teacher's own.

        Raises:
            ValueError: the text is not in the cache, and the text encoder was let go.
        """
        found = self._cache.read(text)
        if found is None:
            if self._teacher.pipeline.text_encoder is None:  # type: ignore[attr-defined]
                raise ValueError(
                    f"text {text[:60]!r} is not in {self._cache.folder}, and no encoder is loaded"
                )
            encoding = self._teacher.encode_text(text)
            self._cache.write(encoding)
            return encoding
        return replace(found, embeds=found.embeds.to(self._teacher.device, self._teacher.dtype))

    def fill(self, texts: Iterable[str]) -> None:
        """Encode and store the texts that are missing."""
        for text in texts:
            self.encode_text(text)

    def drop_encoder(self) -> None:
        """Let go of the text encoder and its memory."""
        self._teacher.pipeline.text_encoder = None  # type: ignore[attr-defined]
        gc.collect()
        if self._teacher.device.type == "cuda":
            torch.cuda.empty_cache()


def ready_teacher(
    load: Callable[..., Teacher],
    cache: TextCache,
    texts: Sequence[str],
    *,
    index: int = 0,
    count: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Teacher:
    """Encode the texts that a cache lacks, and return a teacher whose text encoder was let go.

    Args:
        load: `load(text_encoder=bool)` returns the teacher with this cache.
        cache: of the teacher's texts.
        texts: all it will be given.
        index, count: this process encodes every `count`-th of the missing texts.
        wait: called when it has; waits for the others.
    """
    wanted = [*texts, ""]
    # Shared out before looking: a process that looks later finds what another has written since.
    mine = [text for text in wanted[index::count] if cache.read(text) is None]
    teacher = load(text_encoder=bool(mine))
    assert isinstance(teacher, CachedTextTeacher)
    teacher.fill(mine)
    teacher.drop_encoder()
    wait()
    return teacher
