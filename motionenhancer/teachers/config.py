"""Read a teacher's configuration files. Refuse, by name, unknown fields and fields that do not fit."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json
from .known import FAMILIES, KNOWN, LIBRARIES, MORE, PARTS, Fields
from .schedule import FLOW_TIMESTEPS

#: Fields of the parts of a teacher, by the part's name.
Parts = dict[str, dict[str, Any]]

#: Names of fields that hold a count where their default is an integer.
_COUNT = re.compile(r"^num_|_(dim|size|channels|heads|layers)$|^d_|^hidden_size$")

#: The least value of fields whose numbers the latents are scaled or shifted by; the largest is 1e30.
_SCALES = {"scaling_factor": 1e-30, "latents_std": 1e-30, "latents_mean": -1e30}
#: A scheduler lists all of its training timesteps. Those of the supported models have 1000.
_MOST_TIMESTEPS = 100_000

#: Family → field of the transformer that holds the width of a text encoder → the encoder.
_TEXT_WIDTHS = {
    "cogvideox": {"text_embed_dim": "text_encoder"},
    "cogvideox_image": {"text_embed_dim": "text_encoder"},
    "hunyuan_video": {"text_embed_dim": "text_encoder", "pooled_projection_dim": "text_encoder_2"},
    "hunyuan_video15": {"text_embed_dim": "text_encoder", "text_embed_2_dim": "text_encoder_2"},
    "ltx": {"caption_channels": "text_encoder"},
    "ltx2": dict[str, str](),
    "wan": {"text_dim": "text_encoder"},
}


def read_folder(path: str | Path) -> tuple[str, Parts]:
    """Read the configurations of a teacher's parts; refuse unknown fields.

    Args:
        path: a diffusers folder.

    Returns:
        The family; and part name → fields of the parts that a pipeline would use, including defaults.
        "pipeline" holds the fields of `model_index.json`.

    Raises:
        FileNotFoundError: the folder or one of its configurations is missing.
        ValueError: the pipeline class is not a supported family, a class or a field is unknown, or parts do
            not fit together. The message names the file and the field.
    """
    folder, file = Path(path), Path(path, "model_index.json")
    if not folder.is_dir():
        raise FileNotFoundError(f"teacher {folder}: no such folder; give a diffusers folder on disk")
    if not file.is_file():
        raise FileNotFoundError(
            f"teacher {folder}: no model_index.json in it; give the folder that save_pretrained wrote"
        )
    index = read_json(file)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"teacher {path}: pipeline class {name!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    parts = {**dict.fromkeys(["tokenizer", *PARTS[family]]), **MORE.get((family, "pipeline"), {})}
    found = {"pipeline": _check_fields(file, name, index, parts)}
    for part, classes in PARTS[family].items():
        named = found["pipeline"].get(part)
        if named in (None, [None, None], (None, None)):
            continue
        library = "transformers" if part.startswith("text_encoder") else LIBRARIES.get(part, "diffusers")
        if not isinstance(named, list | tuple) or len(named) != 2 or named[0] != library:
            raise ValueError(f"{file}: {part} is {named!r}; only a class of {library} is supported")
        if named[1] not in classes:
            raise ValueError(f"{file}: {part} is {named[1]!r}; supported are {', '.join(classes)}")
        config = folder / part / (f"{part}_config.json" if part in ("scheduler", "guider") else "config.json")
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such file, but model_index.json names {named[1]}")
        known = {**KNOWN[named[1]], **MORE.get((family, part), {})}
        found[part] = _check_fields(config, named[1], read_json(config), known)
    for part in PARTS[family]:
        if part not in found and (family != "wan" or not part.startswith("transformer")):
            raise ValueError(f"{file}: names no {part}")
    _check_fit(family, folder, found)
    return family, found


def _check_fields(file: Path, name: str, given: Mapping[str, Any], known: Fields) -> dict[str, Any]:
    """The fields of a configuration of class `name`, with defaults; raise for an unknown field or value."""
    defaults = _defaults(name)
    fields = {**defaults, **{k: v for k, v in given.items() if not k.startswith("_")}}
    for field, value in fields.items():
        accepted = known.get(field, (defaults.get(field),))
        if _counts(field, defaults.get(field)) and not (_counts(field, value) or value in (accepted or ())):
            raise ValueError(f"{file}: {field} is {value!r}; it must be a whole number above 0")
        if field == "num_train_timesteps" and value > _MOST_TIMESTEPS:
            raise ValueError(f"{file}: {field} is {value!r}; it must be at most {_MOST_TIMESTEPS}")
        if field in _SCALES and value is not None:
            least = _SCALES[field]
            if not all(_is_number(v) and least < v < 1e30 for v in np.ravel(np.array(value, object))):
                raise ValueError(
                    f"{file}: {field} is {value!r}; each number must be above {least} and below 1e30"
                )
        if accepted is None or any(_same(value, one) for one in accepted):
            continue
        why = (
            f"supported is {' or '.join(map(repr, accepted))}"
            if field in known
            else "this field is not understood, and may change what the model computes"
        )
        raise ValueError(f"{file}: {field} is {value!r}; {why}")
    return fields


def _counts(field: str, value: Any) -> bool:
    """Whether the value of a field must be a count, such as a number of heads."""
    return bool(_COUNT.search(field)) and isinstance(value, int) and value > 0 and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal. Lists equal tuples; 1 does not equal True."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _defaults(name: str) -> dict[str, Any]:
    """The defaults of a class for fields that a file leaves out."""
    import diffusers
    import transformers
    from diffusers.pipelines import ltx2

    cls = (
        getattr(diffusers, name, None)
        or getattr(ltx2, name, None)
        or getattr(transformers, name).config_class
    )
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _check_fit(family: str, folder: Path, found: Parts) -> None:
    """Refuse parts that do not fit together."""
    if family == "wan":
        _check_boundary(folder, found)
    channels = found["vae"]["z_dim" if family == "wan" else "latent_channels"]
    # Further inputs: latents of the first frame, or of a picture with its mask (zero if there is none).
    inputs = {"cogvideox_image": 2 * channels, "hunyuan_video15": 2 * channels + 1}.get(family) or channels
    experts = [part for part in ("transformer", "transformer_2") if part in found]
    for part in experts:
        _check_channels(folder, part, found, channels, inputs)
        for field, encoder in _TEXT_WIDTHS[family].items():
            _check_text(folder, part, found, field, encoder)
    if family == "wan":
        _check_wan(folder, found, experts, channels)
    if family == "ltx2":
        registers = found["connectors"]["video_connector_num_learnable_registers"]
        whole = isinstance(registers, int) and not isinstance(registers, bool)
        if not whole or registers < 1 or 1024 % registers:
            file = folder / "connectors" / "config.json"
            raise ValueError(
                f"{file}: video_connector_num_learnable_registers is {registers!r}; it must divide the 1024 "
                "tokens of a text, whose padding the registers replace"
            )
    if not family.startswith("cogvideox"):
        _check_flow(folder / "scheduler" / "scheduler_config.json", found["scheduler"])


def _check_boundary(folder: Path, found: Parts) -> None:
    file, ratio = folder / "model_index.json", found["pipeline"]["boundary_ratio"]
    if ratio is None:
        # Without a boundary a pipeline never uses its second transformer.
        found.pop("transformer_2", None)
        if "transformer" not in found:
            raise ValueError(f"{file}: must name a transformer, or a boundary_ratio and a transformer_2")
    elif not _is_number(ratio) or not 0 <= ratio <= 1:
        raise ValueError(f"{file}: boundary_ratio is {ratio!r}; it must be a number from 0 to 1")
    elif "transformer_2" not in found:
        raise ValueError(
            f"{file}: boundary_ratio is {ratio}, but there is no transformer_2 for the noise levels below it"
        )


def _check_wan(folder: Path, found: Parts, experts: Sequence[str], channels: int) -> None:
    for part in experts:
        config, patch = folder / part / "config.json", found[part]["patch_size"]
        if len(patch) != 3 or patch[0] != 1:
            raise ValueError(f"{config}: patch_size is {patch!r}; supported is [1, height, width]")
        for field, value in found[experts[0]].items():
            other = found[part].get(field)
            if not _same(value, other):
                raise ValueError(
                    f"{config}: {field} is {other!r}, but {value!r} in transformer; both must have the "
                    "same shape, as their heads are pooled"
                )
    for field in ("latents_mean", "latents_std"):
        values = found["vae"][field]
        if not isinstance(values, list | tuple) or len(values) != channels:
            file = folder / "vae" / "config.json"
            raise ValueError(
                f"{file}: {field} must be {channels} numbers, one for each channel of the latents"
            )


def _check_flow(file: Path, scheduler: Mapping[str, Any]) -> None:
    """Refuse a scheduler whose numbers cannot shift the noise levels."""
    shift = flow_shift(scheduler)
    if not _is_number(shift) or not 0 < shift < math.inf:
        name = "flow_shift" if "flow_shift" in scheduler else "shift"
        raise ValueError(f"{file}: {name} is {shift!r}; it must be a number above 0, and finite")
    terminal = scheduler.get("shift_terminal")
    if terminal is not None and not (_is_number(terminal) and 0 <= terminal < 1):
        raise ValueError(f"{file}: shift_terminal is {terminal!r}; it must be a number from 0 to below 1")
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for name in names if scheduler.get("use_dynamic_shifting") else ():
        if not _is_number(scheduler[name]):
            raise ValueError(f"{file}: {name} is {scheduler[name]!r}; it must be a number")


def flow_shift(scheduler: Mapping[str, Any]) -> float:
    """The shift of a flow's noise levels, from its scheduler's configuration."""
    return scheduler["flow_shift"] if "flow_shift" in scheduler else scheduler["shift"]


def boundary_of(parts: Parts) -> float | None:
    """The timestep below which `transformer_2` is used; None if one transformer is used for all levels.

    Args:
        parts: from `check_folder`.
    """
    ratio = parts["pipeline"].get("boundary_ratio")
    if ratio is None:
        return None
    # At a ratio of 1 a pipeline, whose first step is a little below the last timestep, needs no other.
    return math.inf if ratio == 1 and "transformer" not in parts else ratio * FLOW_TIMESTEPS


def _check_channels(folder: Path, part: str, found: Parts, channels: int, inputs: int) -> None:
    """Refuse a model with other channel counts: it takes more inputs, such as a picture."""
    file, config = folder / part / "config.json", found[part]
    for field, wanted in (("in_channels", inputs), ("out_channels", channels)):
        if config[field] != wanted:
            raise ValueError(
                f"{file}: {field} is {config[field]}, not {wanted}, and the VAE's latents have {channels} "
                "channels: only text-to-video models and CogVideoX's image-to-video are supported"
            )


def _check_text(folder: Path, part: str, found: Parts, field: str, encoder: str) -> None:
    """Refuse a model whose text width differs from the width of the text encoder's hidden states."""
    name = "d_model" if "d_model" in found[encoder] else "hidden_size"
    file, width, given = folder / part / "config.json", found[encoder].get(name), found[part][field]
    if width != given:
        who = "the text encoder" if encoder == "text_encoder" else encoder
        raise ValueError(f"{file}: {field} is {given}, but {who}'s {name} is {width}")
