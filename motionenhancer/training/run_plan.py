"""The plan of a training run, printed before it starts. With `--dry_run`, no weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..alignment.aligner import build_aligner
from ..costs import StudentCost, parameter_count, student_cost
from ..data import Sample, SkipLog
from ..data.digests import DigestCache
from ..priors.arguments import PriorArguments
from ..priors.prior_settings import PriorSettings
from ..priors.storage import PriorStore
from ..settings import StudentArguments
from ..students import StudentFamily
from ..students.load import check_config, unknown_value
from ..students.locate import layers_read, text_model
from .arguments import TrainArguments
from .lora import plain_name


@dataclass(frozen=True)
class Part:
    """A part of the student: its parameters, the number of trained ones, and their peak learning rate."""

    name: str
    parameters: int
    trained: int
    learning_rate: float | None


@dataclass(frozen=True)
class Steps:
    """The length of a run: optimizer steps per pass over `samples` and in total, of `batch` samples each."""

    samples: int
    batch: int
    an_epoch: int
    total: int


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        engine: "plain", "DDP", "FSDP" or "ZeRO-1" to "ZeRO-3".
        schedule: λ in words.
        priors: {"stored", "missing"}, if they were counted.
        attention: the read layers in words; None if nothing is aligned.
    """

    parts: list[Part]
    steps: Steps
    memory: StudentCost
    engine: str
    processes: int
    schedule: str
    priors: dict[str, int] | None = None
    attention: str | None = None

    def to_json(self) -> dict[str, Any]:
        plan = asdict(self)
        plan["memory"] = self.memory.to_json()
        return plan

    def __str__(self) -> str:
        lines = ["what is trained:"]
        for part in self.parts:
            rate = "frozen" if not part.trained else f"learning rate {part.learning_rate:g}"
            share = f"{part.trained:,} of {part.parameters:,} parameters"
            lines.append(f"  {part.name:<16}{share:>44}   {rate}")
        if self.priors is not None:
            lines.append(f"priors: {self.priors['stored']} stored, {self.priors['missing']} missing")
        steps, many = self.steps, "es" if self.processes > 1 else ""
        lines.append(
            f"steps: {steps.total:,} of {steps.batch} samples ({steps.an_epoch:,} per pass over "
            f"{steps.samples:,} samples); {self.processes} process{many}, {self.engine}"
        )
        lines.append(f"alignment weight λ: {self.schedule}")
        if self.attention is not None:
            lines.append(f"the student's {self.attention}")
        return "\n".join([*lines, str(self.memory)])


def plan_run(
    model: nn.Module,
    family: StudentFamily,
    student: StudentArguments,
    training: TrainArguments,
    *,
    samples: int,
    grid: tuple[int, int, int] | None,
    tokens: int | None,
    priors: dict[str, int] | None = None,
) -> RunPlan:
    """Return the plan of training a student, with its adapters if it has any.

    Args:
        model, family, student, training: the student, on any device, and the run's settings.
        samples: the training samples.
        grid: grid of the priors; None if nothing is aligned.
        tokens: number of tokens of one sample, for the memory of activations.
        priors: numbers of stored and missing priors.
    """
    vision = vision_rate(student, training)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(part_of(family, name), [0, 0])
        entry[0] += parameter_count(parameter)
        entry[1] += parameter_count(parameter) * parameter.requires_grad
    parts = [
        Part(name, total, trained, vision if name == "vision tower" else training.learning_rate)
        for name, (total, trained) in counts.items()
    ]
    size = 0
    if grid is not None and student.alignment_weight:
        with torch.device("meta"):
            aligner = build_aligner(student.aligner, grid)
        size = sum(p.numel() for p in aligner.parameters())
        if size:
            parts.append(Part("aligner", size, size, training.learning_rate))
    engine, processes = engine_of(training), training.world_size
    steps = plan_steps(samples, training)
    schedule = student.schedule()
    words = f"{schedule.weight:g}, {schedule.schedule}"
    if schedule.schedule != "constant":
        words += f" to {schedule.end_weight:g}"
    if schedule.warmup:
        words += f", rising over the first {schedule.warmup_steps(steps.total)} steps"
    memory = student_cost(model, training, engine=engine, processes=processes, tokens=tokens, aligner=size)
    read = _attention(model, student) if student.aligned else None
    return RunPlan(parts, steps, memory, engine, processes, words, priors, read)


def _attention(model: nn.Module, student: StudentArguments) -> str:
    """Return the read layers, after a check that they exist."""
    options = student.attention()
    config: Any = text_model(model).config
    heads = config.num_attention_heads
    if not set(options["heads"] or [0]) <= set(range(heads)):
        raise ValueError(f"--alignment_heads must be below {heads}, got {options['heads']}")
    try:
        return str(layers_read(model, options["layers"]))
    except ValueError as error:
        raise ValueError(f"--alignment_{error}") from error


def part_of(family: StudentFamily, parameter: str) -> str:
    """The part of the student to which a parameter belongs; adapters belong to the part of their layer."""
    name = plain_name(parameter)
    if family.in_vision_tower(name):
        return "vision tower"
    if "merger" in name or "projector" in name:
        return "merger"
    return "output head" if "lm_head" in name else "language model"


def vision_rate(student: StudentArguments, training: TrainArguments) -> float:
    """The vision tower's peak learning rate: the paper's 2e-6 beside 1e-5 unless a flag says otherwise."""
    given = student.vision_learning_rate
    return training.learning_rate / 5 if given is None else given


def engine_of(training: TrainArguments) -> str:
    """Name the engine that splits the model over the processes."""
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is not None:
        return f"ZeRO-{plugin.zero_stage}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or training.fsdp_plugin_args:
        return "FSDP"
    return "DDP" if training.world_size > 1 else "plain"


def plan_steps(samples: int, training: TrainArguments) -> Steps:
    """Optimizer steps, as the Trainer counts them."""
    whole = training.dataloader_drop_last
    batches = samples
    for size in (training.train_batch_size, training.world_size):
        batches = batches // size if whole else math.ceil(batches / size)
    an_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * an_epoch)
    return Steps(samples, global_batch(training), an_epoch, total)


def global_batch(training: TrainArguments) -> int:
    """Number of samples of an optimizer step, over all processes and accumulated micro-batches."""
    return training.train_batch_size * training.world_size * training.gradient_accumulation_steps


def count_priors(samples: Sequence[Sample], prior: PriorArguments, settings: PriorSettings) -> dict[str, int]:
    """Numbers of stored priors and of priors to make. Clips are read; no model is loaded.

    Priors that are recorded as impossible count in neither number.
    """
    store, silent = PriorStore(Path(prior.prior_dir)), SkipLog(shout=0)
    keys = set()
    with DigestCache(store.folder, writes=False) as cache:
        for one in prior.each():
            name = one.name(PartialState().device, settings)
            found = one.requests(samples, silent, name=name, digest=cache.digest)
            keys |= {request.key for _, request in found}
    stored = sum(key in store for key in keys)
    return {"stored": stored, "missing": sum(not store.settled(key) for key in keys)}


def teacher_grid(prior: PriorArguments) -> tuple[int, int, int] | None:
    """The grid of the priors of the longest clips; None if the teacher's folder does not give it."""
    try:
        return prior.common_grid("cpu")
    except (ValueError, OSError, KeyError):
        return None


def outline_student(
    folder: str | Path, attn_implementation: str, dtype: torch.dtype
) -> tuple[Any, Any, StudentFamily]:
    """Like `load_student` without weights: a student on the meta device, its processor and family.

    Raises:
        ValueError: the folder or its configuration, processor or weights are missing; the family is unknown.
    """
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"--student {path}: no safetensors weights in this folder")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        family = check_config(path)
        config = AutoConfig.from_pretrained(path, **options)
        processor = AutoProcessor.from_pretrained(path, **options)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
    except (OSError, TypeError, ImportError) as error:
        raise ValueError(f"--student {path}: {error}") from error
    except KeyError as error:
        raise unknown_value(path, error) from error
    return model, processor, family
