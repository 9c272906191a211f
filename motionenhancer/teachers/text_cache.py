"""A teacher's text embeddings on disk, so that its text encoder need not be in memory during training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import whole_file
from .identity import teacher_id
from .protocol import TextEncoding


def encoder_id(teacher: str | Path, dtype: torch.dtype) -> str:
    """Digest of a diffusers folder's text encoder, tokenizer and their dtype.

    Raises:
        FileNotFoundError: the folder has no text encoder or no tokenizer.
    """
    parts = [teacher_id(Path(teacher) / part, dtype=dtype) for part in ("text_encoder", "tokenizer")]
    second = (Path(teacher) / part for part in ("text_encoder_2", "tokenizer_2", "connectors"))
    parts += [teacher_id(part, dtype=dtype) for part in second if part.is_dir()]
    model = (Path(teacher) / "model_index.json").read_bytes()
    return hashlib.sha256("\0".join(parts).encode() + model).hexdigest()[:32]


@dataclass(frozen=True)
class TextCache:
    """A folder of text embeddings: one safetensors file for each text, named by the text and its encoder.

    Files appear complete, by rename. A damaged file counts as missing and is written again.

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
        """The encoding of a text, with `embeds` on the CPU in the encoder's dtype; None if not cached."""
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                embeds, metadata = file.get_tensor("embeds"), file.metadata() or {}
            digest, _, said = metadata["text_encoding"].partition(" ")
            if digest != _digest(path.stem, embeds, said):
                return None
            about = json.loads(said)
            spans = tuple((a, b) for a, b in about["spans"])
            embeds = F.pad(embeds, (0, 0, 0, about["length"] - embeds.shape[1]))
            tokens, words = tuple(about["tokens"]), tuple(about["words"])
            rows = None if about["rows"] is None else tuple(about["rows"])
            return TextEncoding(
                embeds, tokens, spans, text, words, about["truncated"], rows, about["attended"]
            )
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
            "rows": encoding.rows,
            "attended": encoding.attended,
            "length": embeds.shape[1],
        }
        kept, said = embeds[:, :rows].contiguous(), json.dumps(about)
        body = save({"embeds": kept}, {"text_encoding": f"{_digest(target.stem, kept, said)} {said}"})
        with whole_file(target) as temporary:
            temporary.write_bytes(body)
        return target


def _digest(name: str, embeds: torch.Tensor, said: str) -> str:
    """A digest of a file's name and content, to detect altered or exchanged files."""
    body = embeds.contiguous().view(torch.uint8).numpy().tobytes() if embeds.numel() else b""
    return hashlib.sha256(
        f"{name}\0{embeds.dtype}\0{tuple(embeds.shape)}\0{said}\0".encode() + body
    ).hexdigest()
