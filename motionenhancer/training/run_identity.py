"""What makes a training run this run and no other, and where it goes on after a kill."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME

from ..data.sources import open_source
from ..priors.prior import PriorSettings
from ..settings import (
    DataArguments,
    PriorArguments,
    StudentArguments,
    TrainArguments,
    ValidationArguments,
)
from .run_plan import engine_of, global_batch

#: Training arguments that change what is learnt, however the work is spread over processes.
_RECIPE = str.split("""
    learning_rate num_train_epochs max_steps seed data_seed train_sampling_strategy dataloader_drop_last
    average_tokens_across_devices neftune_noise_alpha weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm optim optim_args optim_target_modules lr_scheduler_type lr_scheduler_kwargs warmup_steps
    bf16 fp16
""")
#: Of accelerate's options, those that decide which samples a step is made of.
_BATCHES = ("even_batches", "use_seedable_sampler")
#: Those that decide which step's weights are kept.
_BEST = str.split("load_best_model_at_end metric_for_best_model eval_strategy eval_steps eval_delay")
#: Flags of the student that change nothing of it.
_NOT_LEARNT = ("student", "prior_source", "attn_implementation", "dry_run", "save_aligner", "lora_merge")


def run_identity(
    student: StudentArguments,
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    training: TrainArguments,
    validation: ValidationArguments | None = None,
) -> dict[str, Any]:
    """What makes a run this run: change any of it and the output folder belongs to another.

    Of processes, samples a device and accumulated micro-batches only the product counts, the global batch: a
    run
    may go on with other hardware. Two things tie it to the launch all the same: how its checkpoints are
    split,
    and, where incomplete batches are dropped, the batch of each process.
    """
    trained = open_source(data.data)
    batches = getattr(training, "accelerator_config", None)
    identity = {
        "student": student.student,
        "teacher": prior.teacher,
        "data": trained.name,
        "data_digest": trained.digest(),
        "video_root": data.video_root,
        "limit": data.limit,
        "prior": settings.key(),
        "prompt_source": prior.prompt_source,
        "teacher_options": {k: str(v) for k, v in prior.identity(PartialState().device).items()},
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


def checkpoint_format(engine: str, processes: int) -> str:
    """How checkpoints are split: under another format than they were saved in they cannot be loaded.

    Example:
        >>> checkpoint_format("plain", 1) == checkpoint_format("DDP", 8)
        True
        >>> checkpoint_format("ZeRO-2", 8)
        'ZeRO-2 on 8 processes'
    """
    if engine.startswith("ZeRO"):
        # DeepSpeed cannot deal the optimizer's parts out to another number of processes.
        return f"{engine} on {processes} processes"
    return "FSDP" if engine == "FSDP" else "whole"


def checkpoint_to_resume(training: TrainArguments) -> str | None:
    """The checkpoint named by `--resume_from_checkpoint`, else the newest whole one of the output folder.

    Raises:
        ValueError: the one that is named is none, or has no optimizer's state to go on from.
    """
    given = training.resume_from_checkpoint
    if given is not None and _state(Path(given)) is None:
        raise ValueError(f"--resume_from_checkpoint {given}: no folder of a checkpoint, or not a whole one")
    chosen = given or newest_checkpoint(Path(training.output_dir or ""))
    if chosen is not None and checkpoint_format(engine_of(training), training.world_size) == "whole":
        saved = [(Path(chosen) / name).is_file() for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)]
        if Path(chosen).is_dir() and not any(saved):
            raise ValueError(
                f"{chosen}: holds no optimizer's state ({OPTIMIZER_NAME}), so no run can go on from it: it "
                "was saved with --save_only_model, or under another engine; give another --output_dir"
            )
    return chosen


def aligned_before(checkpoint: str | Path) -> bool:
    """Whether a prior was followed on the way to a checkpoint, as far as its log says."""
    state = _state(Path(checkpoint)) or {}
    return any("loss_align" in entry for entry in state.get("log_history", []))


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a run's folder."""
    numbered = {
        int(f.name[11:]): f for f in folder.glob("checkpoint-*") if f.is_dir() and f.name[11:].isdecimal()
    }
    return next(
        (str(numbered[n]) for n in sorted(numbered, reverse=True) if _state(numbered[n]) is not None), None
    )


def _state(checkpoint: Path) -> Any:
    """The Trainer's state, which it writes last: None where the run was killed while it saved."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, default=str)
    return value if isinstance(value, int | float | None) else str(value)
