"""The flags of transformers' Trainer, and the flags of validation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data.sources import check_source
from ..flags import Settings, check_fields, setting
from ..hub import Upload
from ..options import (
    EVALUATES,
    METRICS,
    RANGES,
    WORKS,
    changed_options,
    naming_options,
    refuse_accelerate_options,
    refuse_options,
)

#: Keys that torch's checkpointing and transformers read. Any other would go to the layers, which ignore it.
_CHECKPOINTING = frozenset(
    str.split("use_reentrant preserve_rng_state determinism_check debug early_stop every_n_layers offload")
)


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments, the paper's recipe as defaults."""

    works: ClassVar[frozenset[str]] = WORKS
    ranges: ClassVar[Mapping[str, Mapping[str, float]]] = RANGES

    output_dir: str | None = setting("runs/train", "Folder for the checkpoint and motion_report.json.")
    learning_rate: float = setting(1e-05, "AdamW's peak learning rate.", least=0)
    weight_decay: float = setting(0.1, "AdamW's weight decay.", least=0)
    lr_scheduler_type: str = setting("cosine", "Learning-rate schedule.")
    warmup_steps: float = setting(0.03, "Number of warm-up steps; below 1: a share of all steps.", least=0)
    num_train_epochs: float = setting(1.0, "Number of passes over the data.", above=0)
    per_device_train_batch_size: int = setting(1, "Samples per device and step.", least=1)
    logging_steps: float | None = setting(  # type: ignore[assignment]
        None, "Steps between log lines. Default: 10, or a tenth of a shorter run.", above=0
    )
    # HfArgumentParser reads a union of three only with None in front.
    per_device_eval_batch_size: int | None = setting(  # type: ignore[assignment]
        None, "Samples per device in evaluation. Default: --per_device_train_batch_size.", least=1
    )
    metric_for_best_model: str | None = setting(
        None,
        "With --load_best_model_at_end: the loss that decides which model is best. Default: loss, the sum of "
        "both terms.",
        choices=[*METRICS, *(f"eval_{name}" for name in METRICS)],
    )
    report_to: None | str | list[str] = setting("none", "Trackers: tensorboard, wandb, none ...")  # noqa: RUF036
    hub_strategy: str = setting("end", "With --push_to_hub: when the model is uploaded.")
    remove_unused_columns: bool = setting(False, "Must stay false.")
    #: `StudentArguments.dry_run`, known only while the object is made
    dry_run: InitVar[bool] = False

    def __post_init__(self, dry_run: bool) -> None:
        #: the run's other flags with their values, which the trackers of `--report_to` show
        self.flags: dict[str, Any] = {}
        check_fields(self)
        without = not torch.accelerator.is_available() and "ACCELERATE_USE_DEEPSPEED" not in os.environ
        if without and (dry_run or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            # A dry run would refuse bf16 otherwise, and each of several processes would train alone.
            self.use_cpu = True
        #: options with another value than their default, before transformers derives others from them
        self.given = changed_options(self)
        refuse_options(self)
        if idle := [name for name in self.given if name.startswith("hub_") and not self.push_to_hub]:
            raise ValueError(f"--{idle[0]} needs --push_to_hub true")
        #: whether `log_ten_times` chooses `logging_steps`
        self.logging_is_free = self.logging_steps is None
        if self.logging_steps is None:
            self.logging_steps = 10
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        with naming_options(self.given):
            super().__post_init__()
        refuse_accelerate_options(self)
        if self.device.type != "cuda":
            self.dataloader_pin_memory = False  # torch would warn that it does nothing
        if self.metric_for_best_model is not None:
            # transformers takes a name that does not end in "loss" for a score.
            self.greater_is_better = False
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("--fp16 needs a GPU: on a CPU accelerate would ignore it; use --bf16")
        if self.n_gpu > 1:
            # One process would split each batch over model copies, out of the capture's reach.
            print("one process trains on one GPU; start torchrun or accelerate launch to use all of them")
            self._n_gpu = 1
        # transformers 5.2x renamed gradient_checkpointing to activation_checkpointing; the old names
        # mirror the new.
        if self.gradient_checkpointing:
            options = {"use_reentrant": False, **dict(self.gradient_checkpointing_kwargs or {})}  # type: ignore[arg-type]
            if unknown := options.keys() - _CHECKPOINTING:
                may = f"it may hold {', '.join(sorted(_CHECKPOINTING))}"
                raise ValueError(
                    f"--gradient_checkpointing_kwargs: unknown {', '.join(sorted(unknown))}; {may}"
                )
            if options["use_reentrant"]:
                why = "re-entrant checkpointing drops the alignment's gradient"
                raise ValueError(f"--gradient_checkpointing_kwargs: use_reentrant must be false: {why}")
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                if hasattr(self, name):
                    setattr(self, name, options)

    def to_dict(self) -> dict[str, Any]:
        """Return all options, and `flags`: transformers sends them to the trackers."""
        return {**self.flags, **super().to_dict()}

    def take_upload(self) -> Upload | None:
        """Take the upload out of the options, so that the Trainer neither uploads nor stores the token.

        Raises:
            ValueError: see `Upload`.
        """
        if not self.push_to_hub:
            return None
        name = self.hub_model_id or Path(str(self.output_dir)).resolve().name
        upload = Upload(name, self.hub_token, self.hub_private_repo, self.hub_revision)
        self.push_to_hub, self.hub_token = False, None
        return upload

    def log_ten_times(self, steps: int) -> None:
        """Log at least ten times in a run of `steps` steps, or after each step of a shorter one."""
        if self.logging_is_free:
            self.logging_steps = min(10, max(1, steps // 10))


@dataclass
class ValidationArguments(Settings):
    """Validation samples, and when their losses stop a run."""

    eval_data: str | None = setting(
        None,
        "Validation samples (file or Hub id). Their losses are logged, by default after each epoch.",
    )
    eval_video_root: str | None = setting(
        None, "Folder of the validation clips. Default: the folder of --eval_data.", exists="folder"
    )
    early_stopping_patience: int | None = setting(
        None, "Stop after N evaluations without a new best --metric_for_best_model.", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None:
            check_source(self.eval_data, "--eval_data")

    def check(self, training: TrainArguments, *, data: str | None, aligned: bool) -> None:
        """Refuse what cannot work. Evaluate after each epoch unless a flag says when.

        Args:
            data: the training data; None for the toy's.
            aligned: whether `loss_align` is computed.

        Raises:
            ValueError: names the flag and what the flag needs.
        """
        asked = [name for name in training.given if name in EVALUATES]
        asked += [name for name in ("eval_video_root", "early_stopping_patience") if getattr(self, name)]
        asked += ["save_strategy best"] * (training.save_strategy == SaveStrategy.BEST)
        if self.eval_data is None:
            if asked:
                raise ValueError(f"--{asked[0]} needs --eval_data, the samples to evaluate")
            return
        if data is None:
            raise ValueError("--eval_data needs --data, the samples to train on")
        if self.early_stopping_patience is not None and not training.load_best_model_at_end:
            raise ValueError(
                "--early_stopping_patience needs --load_best_model_at_end true: the weights of the last "
                "step are not the best ones"
            )
        if "loss_align" in (training.metric_for_best_model or "") and not aligned:
            raise ValueError(
                f"--metric_for_best_model {training.metric_for_best_model}: nothing is aligned; use loss_ar, "
                "or --measure_alignment true"
            )
        if training.eval_strategy == IntervalStrategy.NO:
            training.eval_strategy, training.do_eval = IntervalStrategy.EPOCH, True
