"""What a student family is, how one is found, and how a student is loaded from a folder.

A family is one file of this package with an object ``FAMILY``. It says where text and vision tokens lie, on
which grid, and how a conversation is rendered; everything else is shared.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video

__all__ = [
    "Encoded",
    "StudentFamily",
    "TokenLayout",
    "VisionLayout",
    "known_families",
    "load_student",
    "student_family",
]


#: Fields of language models that change attention weights or logits where their class reads them.
_CHANGES = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "attention_sinks",
    "attn_sinks",
    "sinks",
    "use_sinks",
    "attention_chunk_size",
    "alibi",
    "use_alibi",
    "clip_qkv",
    "qk_norm",
    "use_qk_norm",
    "qk_layernorm",
    "no_rope_layers",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "attn_temperature_tuning",
}


@dataclass(frozen=True)
class VisionLayout:
    """Where one video's tokens lie among a sample's tokens.

    positions: (F * H * W,) int64 token positions in raster order t, h, w.
    grid: (F, H, W) after spatial and temporal merging.
    """

    positions: torch.Tensor
    grid: tuple[int, int, int]

    @property
    def columns(self) -> slice | torch.Tensor:
        """A slice where the tokens are contiguous, their positions where they are not."""
        first, count = int(self.positions[0]), len(self.positions)
        contiguous = torch.equal(self.positions, torch.arange(first, first + count))
        return slice(first, first + count) if contiguous else self.positions


@dataclass(frozen=True)
class TokenLayout:
    """Which characters and which pixels the tokens of a sample stand for.

    text: the conversation as rendered by the chat template, placeholders expanded.
    offsets: (N, 2) int64 character range of each token in ``text``; empty for a token of no characters.
    message_spans: for each message the (start, end) in ``text`` of its text parts, blank ones left out.
    videos: one layout a video, in order of appearance.
    start: padding tokens before the first token; ``videos`` count from the padded beginning, ``offsets`` do
        not: token i is at position start + i.
    """

    text: str
    offsets: torch.Tensor
    message_spans: tuple[tuple[tuple[int, int], ...], ...]
    videos: tuple[VisionLayout, ...] = ()
    start: int = 0

    def shifted(self, count: int) -> TokenLayout:
        """The same tokens after ``count`` more padding tokens."""
        videos = tuple(replace(video, positions=video.positions + count) for video in self.videos)
        return replace(self, videos=videos, start=self.start + count)


@dataclass(frozen=True)
class Encoded:
    """One sample as tensors, not padded.

    input_ids, attention_mask, labels: (N,) int64; labels are -100 except on the assistant's answers that
        are to be learnt and the token that ends each.
    token_inputs: further (N,) int64 model inputs, padded with 0 (e.g. ``mm_token_type_ids``).
    vision_inputs: model inputs whose first dimension counts patches or videos; batches concatenate them.
    layout: characters and vision tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    layout: TokenLayout
    token_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    vision_inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class StudentFamily(Protocol):
    """What a family's file provides."""

    name: str
    """As in ``student_family(...).name``."""
    model_types: tuple[str, ...]
    """The ``model_type`` of the configurations it handles."""
    num_frames: int | None
    """How many frames of a clip it is shown by default; None where frames a second are given instead."""
    equal_frames: bool
    """Whether all videos of a batch must have equally many frames."""

    def in_vision_tower(self, parameter: str) -> bool:
        """Whether the parameter of this name belongs to the vision tower, which learns more slowly."""
        ...

    def encode(
        self,
        processor: Any,
        sample: Sample,
        videos: Sequence[Video],
        images: Sequence[Any] | None = None,
        *,
        max_pixels: int | None = None,
        max_length: int | None = None,
    ) -> Encoded:
        """Render and tokenise one conversation with its decoded videos.

        ``images`` are decoded images; None opens the sample's own files. ``max_pixels`` caps the pixels of a
        frame as the model sees it, where its size is not fixed. ``max_length`` cuts the text after so many
        tokens; vision tokens are never cut.

        Raises:
            ValueError: videos or images do not fit the conversation, a text contains the placeholder of a
                video or image, ``max_length`` would cut vision tokens, or the template cannot be followed.
        """
        ...

    def collate(
        self,
        samples: Sequence[Encoded],
        *,
        pad_token_id: int,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Any]:
        """Pad and stack samples to a batch of model inputs.

        The key ``layouts`` (list of :class:`TokenLayout`, in batch positions) is for the alignment and must
        be taken out before the batch is given to the model; all other keys are model inputs.
        """
        ...


@functools.cache
def known_families() -> dict[str, StudentFamily]:
    """Return every family of this package by ``model_type``."""
    package = importlib.import_module(__package__ or "motionenhancer.students")
    families: dict[str, StudentFamily] = {}
    for info in pkgutil.iter_modules(package.__path__):
        family = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "FAMILY", None)
        if family is not None:
            families.update(dict.fromkeys(family.model_types, family))
    return families


def student_family(model_or_config: Any) -> StudentFamily:
    """Return the family of a model, wrapped or not, of a configuration, or of a ``model_type``.

    Raises:
        ValueError: no family handles its ``model_type``; the message lists those that are known.

    >>> student_family("qwen2_5_vl").name
    'qwen2_5_vl'
    """
    from motionenhancer.students.locate import unwrap_model

    found: Any = model_or_config
    if isinstance(found, torch.nn.Module):
        found = getattr(unwrap_model(found), "config", None)
    model_type = found if isinstance(found, str) else getattr(found, "model_type", None)
    families = known_families()
    if model_type not in families:
        raise ValueError(f"model_type must be one of {sorted(families)}, got {model_type!r}")
    return families[model_type]


def load_student(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, Any, StudentFamily]:
    """Load a student and its processor from an ordinary transformers folder.

    Nothing is downloaded, no pickle is read and no code of the folder is run.

    Args:
        path: a folder with ``config.json``, safetensors weights and the processor's files.
        dtype: of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; as stored by default.
        device: where to put the model; the CPU by default.
        attn_implementation: as in ``from_pretrained``.

    Returns:
        model, processor, family. The model is in evaluation mode.

    Raises:
        ValueError: ``path`` is not a folder, has no readable ``config.json``, weights or processor, or holds
            a model type that no family handles.

    >>> model, processor, family = load_student("path/to/student")  # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path must be a folder of a transformers model, got {str(path)!r}")
    family = check_config(folder)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"path {str(path)!r} has no readable processor: {error}") from error
    _check_processor(processor, folder)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {str(path)!r} has no readable weights: {error}") from error
    except KeyError as error:
        raise unknown_value(folder, error) from error
    if device is not None:
        torch.nn.Module.to(model, device)
    return model, processor, family


def _model_type(folder: Path) -> str:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"path {str(folder)!r} has no config.json")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"path {str(folder)!r} has an unreadable config.json: {error}") from error
    if not isinstance(model_type, str):
        raise ValueError(f"path {str(folder)!r} has a config.json without model_type")
    return model_type


def check_config(folder: Path) -> StudentFamily:
    """See that a student's class knows the fields of ``config.json`` that change attention or logits.

    transformers keeps a field that a class does not read, and computes as if it were not there.

    Args:
        folder: with a ``config.json``.

    Returns:
        The student's family.

    Raises:
        ValueError: no family handles the student; a field of ``_CHANGES`` is set that no class of the
            configuration knows; or transformers refuses the configuration. The message names the field.
    """
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    family = student_family(_model_type(folder))
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except KeyError as error:
        raise unknown_value(folder, error) from error
    except Exception as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    parts = [config, *(getattr(config, name) for name in type(config).sub_configs)]
    known = {name for part in parts for name in inspect.signature(type(part).__init__).parameters}
    for section in (given, *(value for value in given.values() if isinstance(value, dict))):
        for field_name in sorted(_CHANGES - known):
            if section.get(field_name) not in (None, False):
                raise ValueError(
                    f"{folder / 'config.json'}: {field_name} is {section[field_name]!r}; the installed "
                    f"{type(config).__name__} does not read this field, and would compute another model"
                )
        # transformers leaves weights of a method that it does not know as they are.
        method = (section.get("quantization_config") or {}).get("quant_method")
        if method is not None and not any(
            name.startswith(method) for name in AUTO_QUANTIZATION_CONFIG_MAPPING
        ):
            raise ValueError(
                f"{folder / 'config.json'}: quantization_config has the quant_method {method!r}, which the "
                "installed transformers does not know"
            )
    return family


def unknown_value(folder: Path, error: KeyError) -> ValueError:
    """The error for a value in ``config.json``, such as a rope type, that transformers does not know."""
    value = error.args[0] if error.args else None

    def fields_with(section: dict[str, Any]) -> Iterator[str]:
        for name, entry in section.items():
            if isinstance(entry, dict):
                yield from fields_with(entry)
            elif entry == value:
                yield name

    file = folder / "config.json"
    names = " and ".join(fields_with(json.loads(file.read_text(encoding="utf-8")))) or "a field"
    return ValueError(f"{file}: {names} is {value!r}, which the installed transformers does not know")


def _check_processor(processor: Any, folder: Path) -> None:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "video_processor", None) is None:
        raise ValueError(f"path {str(folder)!r} has a {type(processor).__name__}, which takes no videos")
    if not tokenizer.is_fast:
        raise ValueError(f"path {str(folder)!r} has a slow tokenizer, which gives no character offsets")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"path {str(folder)!r} has no chat template")
