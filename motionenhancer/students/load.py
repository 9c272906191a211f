"""Load a student from a folder. Refuse models that the installed transformers would compute wrongly."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from ..files import read_json, too_deep
from ..hub import model_folder
from ..weights import load_whole, not_finite, read_weights
from .families import student_family
from .family import StudentFamily

_ADAPTER = "adapter_config.json"
#: Characters of a chat template. Those of the known families have a few thousand.
_MOST_TEMPLATE = 10**6
#: Most lines of a compiled chat template for one question; the known families run a few hundred.
_MOST_LINES = 10**5
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


def load_student(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, Any, StudentFamily]:
    """Load a student and its processor from an ordinary transformers folder.

    No pickle is read and no code of the folder is run.

    Args:
        path: a folder with ``config.json``, safetensors weights and the processor's files, or with adapters
            (LoRA) as PEFT saves them, or a Hub id; see :func:`motionenhancer.hub.model_folder`.
        dtype: dtype of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; as stored by default.
        device: device of the model; the CPU by default.
        attn_implementation: as in ``from_pretrained``.

    Returns:
        model, processor, family. The model is in evaluation mode; with adapters it is a ``peft.PeftModel``.
        Where the tokenizer gives no maximum length, the family refuses texts beyond the model's positions.

    Raises:
        ValueError: ``path`` is not a folder; it has no readable ``config.json``, weights or processor; no
            family handles its model type; weights of the model are missing; or the tokenizer has tokens that
            the model does not have.

    >>> model, processor, family = load_student("path/to/student")  # doctest: +SKIP
    """
    folder = model_folder(path, "path")
    if not folder.is_dir():
        raise ValueError(f"path must be a folder of a transformers model, got {str(path)!r}")
    base = base_folder(folder)
    family = check_config(base)
    from transformers import AutoModelForImageTextToText

    processor = load_processor(folder)
    try:
        model = load_whole(
            AutoModelForImageTextToText,
            base,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {str(path)!r} has no readable weights: {error}") from error
    except KeyError as error:
        raise unknown_value(base, error) from error
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    most = max(processor.tokenizer.get_vocab().values(), default=0)
    if known is not None and most >= known:
        raise ValueError(
            f"path {str(path)!r}: its tokenizer has tokens up to number {most}, its model embeddings for "
            f"{known} tokens only: they belong to different models"
        )
    if processor.tokenizer.model_max_length > 10**9:  # Its file gives no length.
        # The tokenizer is saved with the student, so it stays as it was.
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        family = replace(family, most_text=longest)
    if base != folder:
        model = _adapted(model, folder)
    if device is not None:
        torch.nn.Module.to(model, device)
    return model, processor, family


def load_processor(folder: Path) -> Any:
    """The processor of a student's folder.

    Raises:
        ValueError: there is no processor; the processor takes no videos, gives no character offsets or has no
            chat template; or the template runs without end.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, RecursionError) and (deep := too_deep(folder)):
            raise ValueError(f"{deep}: not valid JSON (nested too deeply)") from None
        raise ValueError(f"path {str(folder)!r} has no readable processor: {error}") from error
    _check_processor(processor, folder)
    return processor


def base_folder(folder: Path) -> Path:
    """The folder with a student's whole weights: its own folder, or the folder of its adapters' base model.

    Raises:
        ValueError: the base model that the adapters name does not exist.
    """
    file = folder / _ADAPTER
    if (folder / "config.json").is_file() or not file.is_file():
        return folder
    named = read_json(file).get("base_model_name_or_path")
    named = named if isinstance(named, str) else ""
    base = model_folder(named, str(file))
    if not named or not base.is_dir():
        raise ValueError(
            f"{file}: base_model_name_or_path must be the folder or Hub id of the adapters' model, got "
            f"{named!r}, which is not there"
        )
    return base


def _adapted(model: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} holds adapters, which need PEFT: pip install peft ({error})") from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} has no adapter_model.safetensors")
    if wrong := not_finite(read_weights(folder)):
        raise ValueError(
            f"{folder}: the weight {wrong} is NaN or infinite; download or save the adapters again"
        )
    try:
        with warnings.catch_warnings():
            # PEFT only warns; adapters without stored weights would keep their initial weights.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # An unusable configuration can raise an error of any type.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{folder}: its {_ADAPTER} and weights cannot be applied to this model ({said})"
        ) from error


def check_config(folder: Path) -> StudentFamily:
    """Check that a student's class reads the fields of ``config.json`` that change attention or logits.

    transformers keeps a field that a class does not read, and ignores it in the computation.

    Args:
        folder: a folder with a ``config.json``.

    Returns:
        The student's family.

    Raises:
        ValueError: no family handles the student; a field of ``_CHANGES`` is set but no class of the
            configuration reads it; or transformers refuses the configuration. The message names the field.
    """
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"path {str(folder)!r} has no config.json")
    given = read_json(file)
    if not isinstance(given.get("model_type"), str):
        raise ValueError(f"path {str(folder)!r} has a config.json without model_type")
    family = student_family(given["model_type"])
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except KeyError as error:
        raise unknown_value(folder, error) from error
    except Exception as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    parts = [config, *(getattr(config, name) for name in type(config).sub_configs)]
    known = {name for part in parts for name in inspect.signature(type(part).__init__).parameters}
    for section in (given, *(value for value in given.values() if isinstance(value, dict))):
        for field_name in sorted(_CHANGES - known):
            if section.get(field_name) not in (None, False):
                raise ValueError(
                    f"{file}: {field_name} is {section[field_name]!r}; the installed "
                    f"{type(config).__name__} does not read this field, and would compute another model"
                )
        # transformers loads weights of a quantization method that it does not know as they are.
        method = (section.get("quantization_config") or {}).get("quant_method")
        methods = AUTO_QUANTIZATION_CONFIG_MAPPING
        if method is not None and not any(name.startswith(method) for name in methods):
            raise ValueError(
                f"{file}: quantization_config has the quant_method {method!r}, which the installed "
                "transformers does not know"
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
    names = " and ".join(fields_with(read_json(file))) or "a field"
    return ValueError(f"{file}: {names} is {value!r}, which the installed transformers does not know")


def _check_processor(processor: Any, folder: Path) -> None:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "video_processor", None) is None:
        raise ValueError(f"path {str(folder)!r} has a {type(processor).__name__}, which takes no videos")
    if not tokenizer.is_fast:
        raise ValueError(f"path {str(folder)!r} has a slow tokenizer, which gives no character offsets")
    if not (template := getattr(processor, "chat_template", None)):
        raise ValueError(f"path {str(folder)!r} has no chat template")
    if len(str(template)) > _MOST_TEMPLATE:
        raise ValueError(f"path {str(folder)!r} has a chat template of more than {_MOST_TEMPLATE} characters")
    if not _ends(processor):
        raise ValueError(
            f"path {str(folder)!r} has a chat template that does not end: it runs more than "
            f"{_MOST_LINES} lines for one question"
        )


def _ends(processor: Any) -> bool:
    """Whether the chat template ends, for one question and for one question with its answer.

    Jinja's sandbox limits what a template reaches, not how long it runs. Here the lines that the compiled
    template runs are counted, so the result does not depend on the machine's speed.
    """
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != "<template>":
            return None
        lines += 1
        if lines > _MOST_LINES:
            raise RuntimeError("the chat template does not end")
        return count

    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]}
    before = sys.gettrace()
    for messages in ([asked], [asked, answer]):
        sys.settrace(count)
        try:
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=messages == [asked])
        except Exception:
            # A template may refuse these messages; if it refuses a sample too, that error is reported.
            if lines > _MOST_LINES:
                return False
        finally:
            sys.settrace(before)
    return True
