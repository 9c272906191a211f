"""Try a run's options on a tiny model, to find a missing package or device before a model is loaded."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks

from ..options import naming_options
from .arguments import TrainArguments


def rehearse(training: TrainArguments, engine: str) -> None:
    """Train a tiny model for one step with a run's options; nothing is kept.

    This checks, before a model is loaded, that the options have what they need, such as a package, a compiler
    or a GPU. Under FSDP everything is built but no step is taken. Under DeepSpeed only the optimizer and the
    schedule are built, because a process can have only one engine.

    Raises:
        ValueError: the options cannot work here; names them.
    """
    with naming_options(training.given, "report_to"):
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    width = 8
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width,
            vocab_size=width,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    copied = copy.copy(training)
    copied.accelerator_config = copy.deepcopy(training.accelerator_config)
    copied.report_to, copied.save_strategy = [], "no"
    copied.eval_strategy, copied.eval_on_start, copied.load_best_model_at_end = "no", False, False
    if training.optim_target_modules is not None:
        copied.optim_target_modules = "all-linear"
    build_optimizer(copied, model)
    if engine.startswith("ZeRO"):
        return
    if engine != "FSDP":
        copied.per_device_train_batch_size = copied.gradient_accumulation_steps = 1
        copied.max_steps = _steps(training)
        copied.dataloader_num_workers = min(1, training.dataloader_num_workers)
    with (
        tempfile.TemporaryDirectory() as folder,
        naming_options(training.given),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the run itself will warn
        copied.output_dir = folder
        trainer = Trainer(
            model=model, args=copied, train_dataset=[0] * training.world_size, data_collator=_batch
        )
        if engine == "FSDP":
            trainer.get_train_dataloader()
            return
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_OneStep())
        trainer.train()


def build_optimizer(training: TrainArguments, model: Any) -> None:
    """Build the optimizer and the schedule of the options for a model; neither is kept.

    Raises:
        ValueError: a package is missing, or they cannot be built with these options. Names the options.
    """
    with naming_options(training.given, "optim"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
        if training.optim_target_modules is not None and "params" not in options:
            raise ValueError("only galore and apollo optimizers read --optim_target_modules; leave it out")
        optimizer = kind(options.pop("params", model.parameters()), **options)
    with naming_options(training.given, "lr_scheduler", "warmup_steps"):
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(_steps(training)),
            num_training_steps=_steps(training),
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )


class _OneStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def _steps(training: TrainArguments) -> int:
    """Number of steps; if the run does not name it, the number of a long run."""
    return training.max_steps if training.max_steps > 0 else 1000


def _batch(items: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.ones(len(items), 4, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}
