"""Which of transformers' TrainingArguments a run can use, and errors that name the others.

Options that depend on the machine are not in the tables: `rehearsal` tries them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

from .flags import MAX_SEED

#: Options that work, with every value that is not in `REFUSED`.
WORKS = frozenset(
    str.split("""
    output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices neftune_noise_alpha bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    torch_empty_cache_steps full_determinism seed data_seed use_cpu
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    resume_from_checkpoint restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_revision
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    load_best_model_at_end metric_for_best_model greater_is_better
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed accelerator_config local_rank debug skip_memory_metrics do_train
    """)
)

#: Options that have no effect without --eval_data.
EVALUATES = frozenset(
    str.split("""
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end
    metric_for_best_model
    """)
)
#: What an evaluation logs. `--metric_for_best_model` may name each of them.
METRICS = ("loss", "loss_ar", "loss_align", "loss_align_raw")

_PREDICTIONS = "an evaluation computes losses only; score answers with python -m motionenhancer.eval"
_CASTS = "transformers casts only a model that is not in training; a run evaluates with the weights it trains"
_ALIGNER = "the aligner has an optimizer of its own, which follows only schedules of the step number"
_UPLOAD = "only the finished model is uploaded, once"
_LENGTHS = "lengths are known only when a clip has been decoded; use random or sequential"
_IN_BACKWARD = (
    "it changes the weights during the backward pass, so a run could not stop before NaN reaches them; use "
    "an optimizer that changes them after the backward pass"
)
_AVERAGED = (
    "the weights to keep are averages of the trained ones, but the Trainer saves the trained ones; use an "
    "optimizer with one set of weights"
)
_ORDER = "the order of the samples must not depend on chance, so that a stopped run can continue"

#: Refused options: name → reason if any change is refused; name → {value: reason} if only some values are.
REFUSED: Mapping[str, str | Mapping[str, str]] = {
    **dict.fromkeys(
        str.split("""
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps prediction_loss_only
        include_for_metrics batch_eval_metrics do_predict
        """),
        _PREDICTIONS,
    ),
    "bf16_full_eval": _CASTS,
    "fp16_full_eval": _CASTS,
    "do_eval": "give --eval_data, the samples to evaluate",
    "greater_is_better": {"True": "every metric is a loss"},
    "hub_strategy": dict.fromkeys(("every_save", "checkpoint", "all_checkpoints"), _UPLOAD),
    "hub_always_push": _UPLOAD,
    "lr_scheduler_type": dict.fromkeys(("reduce_lr_on_plateau", "greedy"), _ALIGNER),
    "train_sampling_strategy": dict.fromkeys(("group_by_length", "batch_rebalance"), _LENGTHS),
    "length_column_name": _LENGTHS,
    "optim": {
        **dict.fromkeys(
            str.split("""
            lomo adalomo galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise
            apollo_adamw_layerwise
            """),
            _IN_BACKWARD,
        ),
        **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _AVERAGED),
    },
    "label_smoothing_factor": (
        "with video models the Trainer would smooth each token's own label, not the next one's"
    ),
    "remove_unused_columns": "the Trainer would remove the priors from the samples",
    "label_names": "the labels are those that the student's own processor makes",
    "auto_find_batch_size": (
        "the Trainer would start again with a smaller batch, but with weights that are already trained; give "
        "--per_device_train_batch_size and --gradient_accumulation_steps"
    ),
    "ignore_data_skip": "a continued run must not see the same samples again",
    "dataloader_in_order": _ORDER,
    "parallelism_config": "tensor, context and sequence parallelism do not work; use DDP, FSDP2 or ZeRO",
}
#: Option → its range, as `flags.setting` declares it.
RANGES: Mapping[str, Mapping[str, float]] = {
    "max_steps": {"least": 1, "off": -1},
    "gradient_accumulation_steps": {"least": 1},
    "adam_beta1": {"least": 0, "below": 1},
    "adam_beta2": {"least": 0, "below": 1},
    "adam_epsilon": {"least": 0},
    "max_grad_norm": {"least": 0},
    "neftune_noise_alpha": {"least": 0},
    "eval_steps": {"above": 0},
    "eval_delay": {"least": 0},
    "save_steps": {"above": 0},
    "save_total_limit": {"least": 1},
    "torch_empty_cache_steps": {"least": 1},
    "dataloader_num_workers": {"least": 0},
    "dataloader_prefetch_factor": {"least": 1},
    "ddp_timeout": {"least": 1},
    "seed": {"least": 0, "most": MAX_SEED},
    "data_seed": {"least": 0, "most": MAX_SEED},
}
#: Keys of `--accelerator_config` that are refused if they are set.
REFUSED_OF_ACCELERATE: Mapping[str, str] = {
    "dispatch_batches": "batches carry priors, which one process cannot send to the others",
    "split_batches": "give --per_device_train_batch_size, the number of samples per process",
    "gradient_accumulation_kwargs": "give --gradient_accumulation_steps",
}


def refuse_options(training: TrainingArguments) -> None:
    """Refuse options that no run can use. Call it before transformers' own `__post_init__`.

    Raises:
        ValueError: names the option, what it must be and why. A changed option that is in neither table, such
            as a new option of a later transformers, is refused too.
    """
    defaults = {one.name: one.default for one in fields(training)}
    for name, value in changed_options(training).items():
        reason = REFUSED.get(
            name, None if name in WORKS else "it is not known whether this option works here"
        )
        if isinstance(reason, Mapping):
            if (plain := str(_plain(value))) in reason:
                raise ValueError(f"--{name} {plain}: {reason[plain]}")
        elif reason is not None:
            default = defaults[name]
            # A value may be a secret, as --hub_token: it is not repeated.
            must = "not be given" if default in (None, MISSING) else f"stay {str(_plain(default)).lower()}"
            raise ValueError(f"--{name} must {must}: {reason}")


def refuse_accelerate_options(training: TrainingArguments) -> None:
    """Refuse keys of `--accelerator_config` that no run can use. Call it after transformers' `__post_init__`.

    Raises:
        ValueError: names the key and the reason.
    """
    for name, reason in REFUSED_OF_ACCELERATE.items():
        if getattr(training.accelerator_config, name, None):
            raise ValueError(f"--accelerator_config must not set {name}: {reason}")


def changed_options(training: TrainingArguments) -> dict[str, Any]:
    """The options that differ from the dataclass's defaults, by name."""
    changed = {}
    for one in fields(training):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(training, one.name)
        # On the command line several values mean "nothing".
        nothing = not value and default in (None, "", "no", False, 0)
        if one.init and not nothing and _plain(value) != _plain(default):
            changed[one.name] = value
    return changed


@contextmanager
def naming_options(given: Mapping[str, Any], *prefixes: str) -> Iterator[None]:
    """Turn any error inside into a ValueError that names the options at fault.

    Args:
        given: options that may be at fault: name → value.
        prefixes: prefixes of the options that the code inside reads. If no option with such a prefix was
            given, the error names the options that the message mentions.

    Raises:
        ValueError: one line.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        low = said.lower()
        words = {name: value for name, value in given.items() if isinstance(value, str) and len(value) > 2}
        # the text that is not json, or the name of a file
        texts = [text for name in ("doc", "filename") if (text := getattr(error, name, None))]
        meant = (
            [name for name, value in given.items() if value in texts]
            or [name for name in given if prefixes and name.startswith(prefixes)]
            or [name for name in given if any(word in low for word in name.split("_") if len(word) > 3)]
            or [name for name, value in words.items() if value.lower() in low]
            or [n for n, value in given.items() if (n in words or value is True) and n != "output_dir"]
        )
        named = ", ".join(f"--{name} {_plain(given[name])}" for name in meant)
        raise ValueError(f"{named or 'the options of training'}: {said}") from error


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration
