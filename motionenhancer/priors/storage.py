"""The store of priors: one safetensors file for each prior, named by a digest of all of its inputs."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import read_json, whole_file, write_json
from .prior import FORMAT, MotionPrior
from .prior_settings import PriorSettings

_SUFFIX, DAMAGED, _REFUSED = ".safetensors", ".damaged", ".none.json"


class DamagedPrior(ValueError):
    """A stored file that is not what was written: truncated, altered or of another format."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a clip and text can give no prior, which a store keeps instead of the prior.

    Attributes:
        reason: a fixed phrase under which such clips are counted.
        detail: the fault of this clip or text.
        unreadable: the clip itself cannot be read; otherwise only the teacher cannot use it.
        passing: the machine caused the failure, not the clip; such a refusal is not recorded.
    """

    reason: str
    detail: str
    unreadable: bool = False
    passing: bool = False


def prior_key(video_digest: str, text: str, teacher: str, settings: PriorSettings) -> str:
    """The name of a prior: 64 hexadecimal digits over clip, text, teacher and every setting."""
    return prior_keys(teacher, settings)(video_digest, text)


def prior_keys(teacher: str, settings: PriorSettings) -> Callable[[str, str], str]:
    """Return `prior_key` for one teacher and its settings, as a fast function of clip and text."""
    parts = {"format": FORMAT, "settings": asdict(settings), "teacher": teacher}
    return partial(_key, json.dumps(parts, sort_keys=True).removesuffix("}"))


def _key(head: str, video_digest: str, text: str) -> str:
    rest = json.dumps({"text": text, "video": video_digest}).removeprefix("{")
    return hashlib.sha256(f"{head}, {rest}".encode()).hexdigest()


@dataclass(frozen=True)
class PriorStore:
    """A folder of priors. Several writers may run at once: files appear complete, by rename, or not at all.

    Example:
        >>> import tempfile
        >>> "0" * 64 in PriorStore(Path(tempfile.mkdtemp()))
        False
    """

    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def refusal_path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_REFUSED}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def __iter__(self) -> Iterator[str]:
        """All keys, in no particular order."""
        return (path.name.removesuffix(_SUFFIX) for path, placed in self._named() if placed)

    def strays(self) -> Iterator[Path]:
        """Files that no run reads: named as a prior but in another key's folder, or in place of a folder."""
        return (path for path, placed in self._named() if not placed)

    def _named(self) -> Iterator[tuple[Path, bool]]:
        for shard in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            if not shard.is_dir():
                yield shard, False
                continue
            for entry in os.scandir(shard):
                if entry.name.endswith(_SUFFIX):
                    yield Path(entry.path), entry.name.startswith(shard.name)

    def write(self, key: str, prior: MotionPrior) -> Path:
        """Store a prior under `key`. An existing file is replaced atomically, and a refusal is removed.

        The error of half precision is at most 2⁻¹¹ relative for entries above 6.1e-5, and 3e-8 absolute
        below.
        """
        attention = prior.attention.to(torch.float16).contiguous()
        text = text_of_prior(prior)
        # One entry only: safetensors writes several in an order that changes from process to process.
        metadata = {"motion_prior": f"{_digest(key, attention, text)} {text}"}
        target = self.path(key)
        with whole_file(target) as temporary:
            temporary.write_bytes(save({"attention": attention}, metadata))
        self.refusal_path(key).unlink(missing_ok=True)
        return target

    def refuse(self, key: str, refusal: Refusal) -> Path:
        """Record, as json, that this key can have no prior."""
        about = {name: value for name, value in asdict(refusal).items() if name != "passing"}
        write_json(self.refusal_path(key), about)
        return self.refusal_path(key)

    def refusal(self, key: str) -> Refusal | None:
        """Return the reason why a key can have no prior; None without a readable record."""
        path = self.refusal_path(key)
        try:
            return Refusal(**read_json(path)) if path.is_file() else None
        except (OSError, ValueError, TypeError):
            return None

    def settled(self, key: str) -> bool:
        """Whether the prior is stored or recorded as impossible, so that it need not be made."""
        return key in self or self.refusal(key) is not None

    def refusals(self) -> Iterator[tuple[str, Refusal]]:
        """Yield all keys with a recorded refusal, and the refusal."""
        for path in self.folder.glob(f"[0-9a-f][0-9a-f]/*{_REFUSED}"):
            key = path.name[: -len(_REFUSED)]
            if (found := self.refusal(key)) is not None:
                yield key, found

    def read(self, key: str) -> MotionPrior:
        """Load and check a prior.

        Raises:
            KeyError: there is no such prior.
            OSError: the file cannot be read, so its content is unknown.
            DamagedPrior: the content of the file is not what was written.
        """
        path = self.path(key)
        try:
            if not S_ISREG(path.stat().st_mode):  # A pipe would be waited for.
                raise DamagedPrior(f"{path}: not a regular file")
            # safetensors says "no such file" of every file that it cannot open.
            path.open("rb").close()
        except FileNotFoundError:
            raise KeyError(f"no prior {key} in {self.folder}") from None
        try:
            # As numpy: read as torch, safetensors 0.8 loses 64 bytes for good with every tensor.
            with safe_open(path, framework="np") as file:
                metadata, attention = file.metadata() or {}, torch.from_numpy(file.get_tensor("attention"))
            digest, _, text = metadata["motion_prior"].partition(" ")
            if attention.dtype != torch.float16 or digest != _digest(key, attention, text):
                raise ValueError("content does not match its digest and its name")
            prior = prior_from_text(attention, text)
            if wrong := _out_of_range(prior):
                raise ValueError(f"{wrong} is out of the range of a teacher's priors")
            if prior.clip and key != prior_key(prior.clip, prior.prompt, prior.teacher, prior.settings):
                raise ValueError(
                    "it was made from another clip, text, teacher or settings than its name says"
                )
            return prior
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DamagedPrior(f"{path}: {error}") from error

    def set_aside(self, key: str) -> Path:
        """Rename a damaged file, so that it is kept but not read again; return its new path."""
        path = self.path(key)
        aside = path.with_name(path.name + DAMAGED)
        os.replace(path, aside)
        return aside


def text_of_prior(prior: MotionPrior) -> str:
    """All fields of a prior except attention and timings, as json. Equal priors give equal text."""
    left_out = ("attention", "seconds", "settings")
    about = {f.name: getattr(prior, f.name) for f in fields(prior) if f.name not in left_out}
    about["settings"] = asdict(prior.settings)
    return json.dumps(about, sort_keys=True)


def prior_from_text(attention: torch.Tensor, text: str) -> MotionPrior:
    """The inverse of `text_of_prior`; the prior has no timings.

    Raises:
        KeyError, TypeError, ValueError: the text does not describe a prior.
    """
    about: dict[str, Any] = json.loads(text)
    settings = PriorSettings(**about.pop("settings"))
    about["grid"] = tuple(about["grid"])
    for name in ("spans", "all_spans"):
        about[name] = [tuple(span) for span in about[name]]
    return MotionPrior(attention=attention, settings=settings, **about)


def _out_of_range(prior: MotionPrior) -> str:
    """Name the first field of a prior with an impossible value; empty if there is none."""
    words, all_words, scores = len(prior.kept), len(prior.all_tokens), prior.head_scores
    heads, length = {len(values) for values in scores.values()}, len(prior.prompt)
    spans, all_spans = ((0 <= a <= b <= length for a, b in s) for s in (prior.spans, prior.all_spans))
    shape, valid = (words, math.prod(prior.grid)), prior.attention.isfinite() & (prior.attention >= 0)
    right = {
        "grid": len(prior.grid) == 3 and all(isinstance(n, int) and n > 0 for n in prior.grid),
        "attention": prior.attention.shape == shape and bool(valid.all()),
        "kept": _ascending(prior.kept, all_words) and len(prior.tokens) == words,
        "spans": len(prior.spans) == words and all(spans),
        "all_spans": len(prior.all_spans) == len(prior.token_scores) == all_words and all(all_spans),
        # A prior without a video model has none.
        "heads": (len(heads) == 1 and _ascending(prior.heads, *heads)) or not (prior.heads or scores),
        "confidence": all(0 <= value <= 1 for value in prior.confidence.values()),
    }
    return next((name for name, fine in right.items() if not fine), "")


def _ascending(places: list[int], count: int) -> bool:
    """Whether these are ascending, distinct indices below `count`, and at least one."""
    inside = all(isinstance(place, int) and 0 <= place < count for place in places)
    return bool(places) and inside and sorted(set(places)) == places


def _digest(key: str, attention: torch.Tensor, text: str) -> str:
    body = attention.contiguous().view(torch.uint8).numpy().tobytes() if attention.numel() else b""
    return hashlib.sha256(f"{key}\0{tuple(attention.shape)}\0{text}\0".encode() + body).hexdigest()
