"""Loads the weights of students, teachers and checkpoints, and refuses a folder that lacks some."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_loaded", "load_whole"]

#: Buffers that older libraries saved and newer ones compute.
_COMPUTED = ("position_ids", "inv_freq")


def load_whole(model_class: Any, folder: str | Path, **options: Any) -> Any:
    """Load a model of transformers or diffusers from safetensors on this disk.

    Args:
        model_class: its class.
        folder: with its configuration and all of its weights.
        **options: others of `from_pretrained`.

    Raises:
        ValueError: see `check_loaded`.
    """
    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, info = model_class.from_pretrained(folder, **options)
    check_loaded(folder, info)
    return model


def check_loaded(folder: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse a model whose weights were not all in its folder, or whose folder holds others.

    transformers and diffusers only warn: they fill missing weights with random numbers, and drop others.

    Args:
        folder: that the model was loaded from.
        info: what `from_pretrained(..., output_loading_info=True)` returned beside the model.

    Raises:
        ValueError: names the folder and the first of the weights.

    >>> check_loaded("student", {"missing_keys": ["head.weight"], "unexpected_keys": []})
    Traceback (most recent call last):
    ValueError: student: 1 weight is missing (head.weight); download or save the model again
    """
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith(_COMPUTED)]
    faults = [*_said("missing", info["missing_keys"]), *_said("not of this model", unexpected)]
    if faults:
        raise ValueError(f"{folder}: {' and '.join(faults)}; download or save the model again")


def _said(what: str, keys: Collection[str]) -> list[str]:
    if not keys:
        return []
    count = f"{len(keys)} weight{' is' if len(keys) == 1 else 's are'} {what}"
    return [f"{count} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"]
