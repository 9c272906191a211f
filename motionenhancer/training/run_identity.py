"""The identity of a training run, and the checkpoint from which it continues."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerState
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_pt_utils import safe_globals

from ..alignment.aligner_training import FOLDER as ALIGNER
from ..data.sources import open_source
from ..priors.arguments import REGIONS, PriorArguments
from ..priors.prior_settings import PriorSettings
from ..processes import from_main
from ..settings import DataArguments, StudentArguments
from ..weights import not_finite, read_weights
from .arguments import TrainArguments, ValidationArguments
from .run_plan import engine_of, global_batch

#: Training arguments that change the result, however the work is split over processes.
_RECIPE = str.split("""
    learning_rate num_train_epochs max_steps seed data_seed train_sampling_strategy dataloader_drop_last
    average_tokens_across_devices neftune_noise_alpha weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm optim optim_args optim_target_modules lr_scheduler_type lr_scheduler_kwargs warmup_steps
    bf16 fp16
""")
#: Of accelerate's options, those that decide which samples a step is made of.
_BATCHES = ("even_batches", "use_seedable_sampler")
#: Options that decide which step's weights are kept.
_BEST = str.split("load_best_model_at_end metric_for_best_model eval_strategy eval_steps eval_delay")
#: Files with the state from which a run continues. Several processes number their random states.
_STATES = {
    "optimizer": (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN),
    "schedule": (SCHEDULER_NAME,),
    "random": ("rng_state.pth", "rng_state_0.pth"),
}
#: Flags of the student that do not change the result.
_NOT_LEARNT = (
    *("prior_source", "attn_implementation", "dry_run", "save_aligner", "lora_merge"),
    "sample_cache_mb",
)


def run_identity(
    student: StudentArguments,
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    training: TrainArguments,
    validation: ValidationArguments | None = None,
) -> dict[str, Any]:
    """Return a run's identity: with any change the output folder belongs to another run.

    Only the global batch counts, not its factors: the numbers of processes, of samples per device and of
    accumulated micro-batches. So a run may continue on other hardware. Two more things must stay the same:
    the format of its checkpoints, and, if incomplete batches are dropped, the factors.
    """
    trained = open_source(data.data)
    batches = getattr(training, "accelerator_config", None)
    identity = {
        "teacher": prior.teacher,
        # Left out where it plays no part, so that reports of older runs, which lack it, are equal.
        **({"teacher_weights": list(prior.weights() or ["confidence"])} if len(prior.teachers) > 1 else {}),
        "data": trained.name,
        "data_digest": trained.digest(),
        "video_root": data.video_root,
        "limit": data.limit,
        "prior": asdict(settings),
        "prompt_source": prior.prompt_source,
        "teacher_options": {k: str(v) for k, v in _options(prior).items()},
        **{k: v for k, v in asdict(student).items() if k not in _NOT_LEARNT},
        **{name: _plain(getattr(training, name, None)) for name in _RECIPE},
        **{name: _plain(getattr(batches, name, None)) for name in _BATCHES},
        "global_batch_size": global_batch(training),
        "checkpoints": checkpoint_format(engine_of(training), training.world_size),
    }
    if validation is not None and validation.eval_data is not None:
        source = open_source(validation.eval_data)
        identity |= asdict(replace(validation, eval_data=None))
        identity |= {"eval_data": source.name, "eval_data_digest": source.digest()}
        if training.load_best_model_at_end:
            identity |= {name: _plain(getattr(training, name)) for name in _BEST}
    if training.dataloader_drop_last:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"):
            identity[name] = getattr(training, name)
    return identity


def _options(prior: PriorArguments) -> dict[str, Any]:
    options = (prior.each() or [prior])[0].identity(PartialState().device)
    regions = {"region_grid": prior.region_grid} if REGIONS in prior.teachers else {}
    return {**options, **regions}


def checkpoint_format(engine: str, processes: int) -> str:
    """How checkpoints are split. A checkpoint can be loaded only in the format in which it was saved.

    Example:
        >>> checkpoint_format("plain", 1) == checkpoint_format("DDP", 8)
        True
        >>> checkpoint_format("ZeRO-2", 8)
        'ZeRO-2 on 8 processes'
    """
    if engine.startswith("ZeRO"):
        # DeepSpeed cannot split the optimizer's state over another number of processes.
        return f"{engine} on {processes} processes"
    return "FSDP" if engine == "FSDP" else "whole"


def checkpoint_to_resume(training: TrainArguments) -> str | None:
    """The checkpoint named by `--resume_from_checkpoint`, else the newest good one of the output folder.

    A damaged checkpoint of the output folder is named and skipped. One process looks; all processes call
    this.

    Raises:
        ValueError: the named checkpoint does not exist or is damaged; or all checkpoints of the output folder
            are damaged.
    """
    found = from_main(_to_resume(training) if PartialState().is_main_process else ("", None))
    if found[0]:
        raise ValueError(found[0])
    return found[1]


def _to_resume(training: TrainArguments) -> tuple[str, str | None]:
    """Return the faults of the checkpoints, or the checkpoint to continue from."""
    given = training.resume_from_checkpoint
    if given is not None and _state(Path(given)) is None:
        return f"--resume_from_checkpoint {given}: not the folder of a whole checkpoint", None
    whole = checkpoint_format(engine_of(training), training.world_size) == "whole"
    flaw = ""
    for folder in _newest_first(Path(training.output_dir or "")) if given is None else [Path(given)]:
        if not (folder / TRAINER_STATE_NAME).is_file():
            continue  # the run was killed while it saved
        problem = _flaw(folder, whole)
        if not problem:
            if flaw:
                print(f"{flaw}; {folder.name} is taken instead", file=sys.stderr)
            return "", str(folder)
        flaw = flaw or problem
    return flaw and f"{flaw}; there is no other checkpoint to continue from: give another --output_dir", None


def _flaw(folder: Path, whole: bool) -> str:
    """Return why a run cannot continue from a checkpoint; empty if it can. Sharded weights are not read."""
    state, number = _state(folder), folder.name.removeprefix("checkpoint-")
    if state is None:
        return f"{folder / TRAINER_STATE_NAME}: damaged"
    if number.isdecimal() and int(number) != state["global_step"]:
        return f"{folder / TRAINER_STATE_NAME}: global_step is {state['global_step']}, not {number}"
    if not whole:
        return ""
    for what, names in _STATES.items():
        if not any((folder / name).is_file() for name in names):
            return (
                f"{folder}: has no {what} state ({names[0]}), so no run can continue from it: it was saved "
                "with --save_only_model, or under another engine"
            )
    numbered = {file.name for file in folder.glob("rng_state_*.pth")}
    if lost := sorted({f"rng_state_{n}.pth" for n in range(len(numbered))} - numbered):
        return f"{folder}: has no {lost[0]}, the random state of one of its processes"
    for file in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        try:
            with safe_globals():
                fault = _fault(file, torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:
            # torch raises errors of many types, with advice that does not fit here.
            fault = f"damaged ({type(error).__name__})"
        if fault:
            return f"{file}: {fault}"
    try:
        wrong = not_finite(chain(read_weights(folder), read_weights(folder / ALIGNER)))
    except ValueError as error:
        return str(error)
    return f"{folder}: the weight {wrong} is NaN or infinite" if wrong else ""


def _fault(file: Path, state: Any) -> str:
    """Return what is wrong with a state that was read from a checkpoint's file; empty if nothing is.

    Raises:
        Exception: of any type, where the state is not built as such a state must be.
    """
    if file.name.startswith("rng_state"):
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
    elif file.name == SCHEDULER_NAME:
        index(state["last_epoch"])
    elif file.name == OPTIMIZER_NAME:
        if not any(group["params"] for group in state["param_groups"]):
            return "holds no parameters"
        # Without its moments, Adam would start again. But a loss scaler may have skipped every step so far.
        begun = any("betas" in group for group in state["param_groups"])
        lost = not state["state"] or not all(state["state"].values())
        if begun and lost and not file.with_name(SCALER_NAME).exists():
            return "holds no moments of some of its parameters"
        held = [(f"{n}.{k}", v) for n, of in state["state"].items() for k, v in of.items()]
        shapes = {name: value.shape for name, value in held if isinstance(value, torch.Tensor)}
        for name, shape in shapes.items():
            # With another shape an optimizer would write outside of its memory.
            if shapes.get(f"{name}_sq", shape) != shape:
                return f"{name} has another shape than {name}_sq"
        if wrong := not_finite((name, value) for name, value in held if name in shapes):
            return f"{wrong} is NaN or infinite"
    return ""


def aligned_before(checkpoint: str | Path) -> bool:
    """Whether the log of a checkpoint shows that a prior was followed."""
    state = _state(Path(checkpoint)) or {}
    return any("loss_align" in entry for entry in state.get("log_history", []))


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run's folder."""
    return next((str(found) for found in _newest_first(folder) if _state(found) is not None), None)


def _newest_first(folder: Path) -> Iterator[Path]:
    """A run's checkpoints, newest first, complete or not."""
    numbered = {
        int(f.name[11:]): f for f in folder.glob("checkpoint-*") if f.is_dir() and f.name[11:].isdecimal()
    }
    return (numbered[n] for n in sorted(numbered, reverse=True))


def _state(checkpoint: Path) -> Any:
    """The Trainer's state as json, which it writes last: None where the run was killed while it saved."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        step = state["global_step"]
        right = isinstance(step, int) and step > 0 and all("step" in e for e in state["log_history"])
        return state if right and TrainerState(**state) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, default=str)
    return value if isinstance(value, int | float | None) else str(value)
