"""One style of settings for every command: dataclasses, a yaml file, flags that override it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from .online.text_cache import CachedTextTeacher, TextCache, encoder_id
from .prior import PriorSettings
from .vdm import Teacher, load_teacher, teacher_dtype, teacher_id
from .vdm.plan import size_multiple


@dataclass
class DataArguments:
    """Where the clips and their conversations are."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "LLaVA json/jsonl, or messages+videos jsonl. Default: the toy world, made on first use."
        },
    )
    video_root: str | None = field(
        default=None, metadata={"help": "Folder that video paths are relative to. Default: the data file's."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first so many samples."})


@dataclass
class PriorArguments:
    """Which teacher reads the clips, how, and where its priors are kept."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "Diffusers folder of a video diffusion model. Default: the toy teacher."},
    )
    prior_dir: str = field(default="runs/priors", metadata={"help": "Folder of stored priors."})
    prompt_source: str = field(
        default="both",
        metadata={"help": "Text given to the teacher.", "choices": ["both", "question", "answer"]},
    )
    ddim_steps: int = field(default=5, metadata={"help": "DDIM steps each way."})
    guidance_scale: float = field(default=6.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    guidance_scale_2: float | None = field(
        default=None,
        metadata={"help": "Guidance of a second expert, for low noise (Wan 2.2 A14B). Default: the same."},
    )
    start: str = field(
        default="inverted",
        metadata={"help": "Where reconstruction starts.", "choices": ["inverted", "random"]},
    )
    memory: bool = field(
        default=True, metadata={"help": "Attend to the inverted clip's keys and values too."}
    )
    head_ratio: float = field(default=0.5, metadata={"help": "Share of heads kept; 1 keeps all."})
    token_ratio: float = field(default=0.5, metadata={"help": "Share of words kept; 1 keeps all."})
    head_selection: str = field(
        default="mhs",
        metadata={
            "help": "Motion-sensitive head selection, or the mean over all heads.",
            "choices": ["mhs", "off"],
        },
    )
    token_selection: str = field(
        default="mtti",
        metadata={
            "help": "Motion-salient token identification, or all words kept.",
            "choices": ["mtti", "off"],
        },
    )
    sampled_rows: str = field(
        default="64", metadata={"help": 'Rows read for a head\'s square sum, or "all".'}
    )
    prior_seed: int = field(default=0, metadata={"help": "Seed of a random start, and of renoise's noise."})
    prior_mode: str = field(
        default="reconstruct",
        metadata={
            "help": "The paper's inversion and reconstruction, or one evaluation of the noised latent.",
            "choices": ["reconstruct", "renoise"],
        },
    )
    noise_level: int = field(default=200, metadata={"help": "Training timestep of renoise, 0 to 999."})
    step_weights: str | None = field(
        default=None,
        metadata={"help": "Weights of the steps in the pooled map, noisiest first: 0,0,0,1,1."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "auto: bfloat16 on CUDA, float32 on the CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    teacher_size: str | None = field(
        default=None,
        metadata={"help": "HEIGHTxWIDTH of the clips. Default: as the model was trained."},
    )
    teacher_frames: int | None = field(
        default=None, metadata={"help": "Most frames of a clip. Default: as the model was trained."}
    )
    vae_tiling: bool = field(default=False, metadata={"help": "Encode in tiles: less memory, other latents."})
    offload_text_encoder: bool = field(default=False, metadata={"help": "Leave the text encoder on the CPU."})
    text_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the teacher's text embeddings for this and later runs."},
    )
    compile_teacher: bool = field(default=False, metadata={"help": "torch.compile the transformer's blocks."})
    split_batch: bool = field(
        default=False,
        metadata={"help": "Evaluate guidance's two texts one after the other."},
    )
    measure_roundtrip: bool = field(
        default=False,
        metadata={"help": "Also invert and rebuild one clip without guidance, and report the error."},
    )

    def settings(self) -> PriorSettings:
        """The settings a prior is keyed by.

        Raises:
            ValueError: a value is out of range.
        """
        rows = self.sampled_rows
        if rows != "all" and not rows.isdecimal():
            raise ValueError(f'--sampled_rows must be a positive number or "all", got {rows!r}')
        step_weights = _numbers(self.step_weights)
        try:
            return PriorSettings(
                steps=self.ddim_steps,
                guidance_scale=self.guidance_scale,
                guidance_scale_2=self.guidance_scale_2,
                start=self.start,
                memory=self.memory,
                head_ratio=self.head_ratio,
                token_ratio=self.token_ratio,
                sampled_rows=rows if rows == "all" else int(rows),
                seed=self.prior_seed,
                mode=self.prior_mode,
                noise_level=self.noise_level,
                step_weights=step_weights,
                head_selection=self.head_selection,
                token_selection=self.token_selection,
            )
        except ValueError as error:
            # The library's names of three of them are not the flags'.
            name, _, rest = str(error).partition(" ")
            flag = {"steps": "ddim_steps", "seed": "prior_seed", "mode": "prior_mode"}.get(name, name)
            raise ValueError(f"--{flag} {rest}") from error

    def identity(self, device: torch.device | str) -> dict[str, Any]:
        """The options of `load_teacher` that change what is computed, and so the teacher's id.

        Raises:
            ValueError: --teacher_size is no size, or none that the teacher takes.
        """
        size = None
        if self.teacher_size is not None:
            parts = self.teacher_size.lower().split("x")
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise ValueError(
                    f"--teacher_size must be HEIGHTxWIDTH like 480x720, got {self.teacher_size!r}"
                )
            size = (int(parts[0]), int(parts[1]))
            self._check_size(size)
        named = self.teacher_dtype
        dtype = teacher_dtype(device) if named == "auto" else getattr(torch, named)
        return {"dtype": dtype, "size": size, "frames": self.teacher_frames, "vae_tiling": self.vae_tiling}

    def _check_size(self, size: tuple[int, int]) -> None:
        try:
            multiple = size_multiple(self.teacher or "")
        except (OSError, ValueError):
            # A folder that does not say is refused in words of its own once it is to be used.
            return
        if any(n < multiple or n % multiple for n in size):
            raise ValueError(
                f"--teacher_size must be HEIGHTxWIDTH in multiples of {multiple} pixels for {self.teacher}, "
                f"got {self.teacher_size!r}"
            )

    def teacher_id(self, device: torch.device | str) -> str:
        """The id `load` will give, without loading anything."""
        assert self.teacher is not None
        return teacher_id(self.teacher, **self.identity(device))

    def load(self, device: torch.device | str, *, text_encoder: bool = True) -> Teacher:
        """The teacher, loaded as these options say.

        Without its text encoder it knows the texts of `text_cache` only.
        """
        assert self.teacher is not None
        teacher = load_teacher(
            self.teacher,
            device,
            **self.identity(device),
            offload_text_encoder=self.offload_text_encoder,
            compile=self.compile_teacher,
            split_batch=self.split_batch,
            text_encoder=text_encoder,
        )
        cache = self.texts(device)
        return teacher if cache is None else CachedTextTeacher(teacher, cache)

    def texts(self, device: torch.device | str) -> TextCache | None:
        """The cache of text embeddings, if there is to be one."""
        if self.text_cache is None:
            return None
        assert self.teacher is not None
        dtype = self.identity(device)["dtype"]
        return TextCache(Path(self.text_cache), encoder_id(self.teacher, dtype))


def parse_arguments(
    classes: tuple[Any, ...],
    argv: Sequence[str] | None,
    *,
    prog: str,
    recipe: Callable[[argparse.Namespace], Path | None] = lambda chosen: None,
) -> tuple[Any, ...]:
    """Flags over `--config file.yaml` over a recipe over the dataclasses' own defaults.

    Args:
        classes: dataclasses, no two with a field of the same name.
        argv: the command line without the program's name; None reads `sys.argv`.
        prog: shown in help and errors.
        recipe: from the flags and the config, a yaml file of defaults, or None.

    Raises:
        SystemExit: a bad flag, a missing or malformed yaml file or an unknown field in it; the message
            names it.
    """
    parser = HfArgumentParser(classes, prog=prog, allow_abbrev=False)
    # The list of all options is a page long: errors should not drown in it.
    parser.usage = "%(prog)s [--option value ...], with --help for all options"
    parser.add_argument("--config", default=None, help="yaml file of these same options; flags override it")
    names = {f.name for cls in classes for f in fields(cls) if f.init}
    try:
        chosen = parser.parse_args(argv)
        config = {} if chosen.config is None else _read_config(Path(chosen.config), names, parser)
        parser.set_defaults(**config)
        base = recipe(parser.parse_args(argv))
        if base is not None:
            parser.set_defaults(**{**_read_config(base, names, parser), **config})
        values = vars(parser.parse_args(argv))
        return tuple(cls(**{f.name: values[f.name] for f in fields(cls) if f.init}) for cls in classes)
    except ValueError as error:
        parser.error(str(error))


def _numbers(text: str | Sequence[float] | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in (text.split(",") if isinstance(text, str) else text))
    except (ValueError, TypeError):
        raise ValueError(f"--step_weights must be numbers between commas, got {text!r}") from None


def _read_config(path: Path, names: set[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid yaml ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must be a mapping of options, got {type(values).__name__}")
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        hints = [difflib.get_close_matches(key, names, n=1) for key in unknown]
        listed = ", ".join(
            f"{k!r}" + (f" (did you mean {h[0]!r}?)" if h else "")
            for k, h in zip(unknown, hints, strict=True)
        )
        raise ValueError(f"--config {path}: unknown field {listed}")
    for action in parser._actions:
        if isinstance(given := values.get(action.dest), list) and action.nargs is None:
            values[action.dest] = ",".join(map(str, given))  # as the flag itself takes several
        if isinstance(values.get(action.dest), str | int | float):
            values[action.dest] = _as_flag(action, values[action.dest], path)
    return values


def _as_flag(action: argparse.Action, value: str | int | float, path: Path) -> str:
    """The value as it would stand on the command line: argparse converts such defaults, others it trusts."""
    text = str(value)
    allowed = None if action.choices is None else [str(choice) for choice in action.choices]
    if value is False and allowed is not None and "off" in allowed:
        text = "off"  # what a bare off means in yaml
    if allowed is not None and text not in allowed:
        raise ValueError(f"--config {path}: {action.dest} must be one of {', '.join(allowed)}, got {text!r}")
    return text
