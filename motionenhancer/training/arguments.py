"""The flags of `python -m motionenhancer.train` beyond those of data and priors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..online.arguments import SOURCES
from ..online.ranks import serving
from .options import changed_options, naming_options, refuse_accelerate_options, refuse_options
from .schedule import SCHEDULES, AlignmentSchedule

#: Keys that torch's checkpointing and transformers read. Layers would be handed any other, and ignore it.
_CHECKPOINTING = frozenset(
    str.split("use_reentrant preserve_rng_state determinism_check debug early_stop every_n_layers offload")
)


@dataclass
class StudentArguments:
    """The model to tune and how strongly it is pulled."""

    student: str | None = field(
        default=None,
        metadata={
            "help": "Transformers folder of a video VLM. Default: the toy student, trained with its recipe."
        },
    )
    prior_source: str = field(
        default="hybrid",
        metadata={
            "help": "store: every prior must be in --prior_dir; online: all are made while training, none is "
            "kept; hybrid: what --prior_dir lacks is made while training and kept there.",
            "choices": list(SOURCES),
        },
    )
    alignment_weight: float = field(default=1.0, metadata={"help": "λ; 0 is plain fine-tuning."})
    alignment_schedule: str = field(
        default="constant",
        metadata={"help": "λ over the run.", "choices": list(SCHEDULES)},
    )
    alignment_warmup: float = field(
        default=0.0, metadata={"help": "Steps over which λ rises, or below 1 their share of all steps."}
    )
    alignment_end_weight: float = field(
        default=0.0, metadata={"help": "λ where a linear or cosine schedule ends."}
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the vision tower. Default: a fifth of the rest."},
    )
    alignment_loss: str = field(
        default="l2", metadata={"help": "Distance of two maps.", "choices": ["l2", "mse", "kl"]}
    )
    aligner: str = field(
        default="mlp",
        metadata={
            "help": "Module between student and prior, thrown away after training.",
            "choices": ["mlp", "identity", "pointwise", "conv"],
        },
    )
    save_aligner: str | None = field(
        default=None,
        metadata={"help": "Safetensors file outside --output_dir that receives the trained aligner."},
    )
    prior_temperature: float = field(
        default=1.0,
        metadata={"help": "The prior's rows are raised to one over this: below 1 they become sharper."},
    )
    confidence_gate: float = field(
        default=0.0,
        metadata={"help": "Follow priors less confident than this proportionally less; 0 is no gate."},
    )
    measure_alignment: bool = field(default=False, metadata={"help": "Log loss_align also when λ is 0."})
    lora_r: int = field(
        default=0, metadata={"help": "Rank of low-rank adapters trained instead of all weights; 0 is none."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The adapters' scale times their rank. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target: str = field(
        default="language",
        metadata={
            "help": "Layers with adapters: all linear ones of the language model, all of the model, or names "
            "between commas, or those after the last dot of a name: q_proj,v_proj."
        },
    )
    lora_merge: bool = field(
        default=False, metadata={"help": "Save the whole model, adapters added into it, and no adapter."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Say what the run would do, and stop: no weights are read."}
    )
    video_fps: float | None = field(default=None, metadata={"help": "Frames a second. Default: 1."})
    num_frames: int | None = field(
        default=None,
        metadata={"help": "Frames of a clip, evenly. Default: the family's, 8 for InternVL, else by rate."},
    )
    max_frames: int = field(default=64, metadata={"help": "Most frames of one clip by rate."})
    max_pixels: int | None = field(
        default=None, metadata={"help": "Most pixels of a frame, before patching."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "The student's attention."})

    @property
    def aligned(self) -> bool:
        """Whether priors are needed."""
        return self.alignment_weight != 0 or self.measure_alignment

    def schedule(self) -> AlignmentSchedule:
        """λ over the run.

        Raises:
            ValueError: a flag of it is out of range.
        """
        return AlignmentSchedule(
            self.alignment_weight, self.alignment_schedule, self.alignment_warmup, self.alignment_end_weight
        )

    def check(self, output_dir: str | Path) -> None:
        """Refuse what cannot work, before anything is read.

        Raises:
            ValueError: names the flag, what it was and what it must be.
        """
        self.schedule()
        for name, value, allowed in (
            ("lora_r", self.lora_r, self.lora_r >= 0),
            ("lora_alpha", self.lora_alpha, self.lora_alpha is None or self.lora_alpha > 0),
        ):
            if not allowed:
                raise ValueError(f"--{name} must be a positive number, got {value}")
        if not 0 < self.prior_temperature < float("inf"):
            raise ValueError(f"--prior_temperature must be above 0, got {self.prior_temperature}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if not self.lora_r:
            defaults = StudentArguments()
            for name in ("lora_alpha", "lora_dropout", "lora_target", "lora_merge"):
                if getattr(self, name) != getattr(defaults, name):
                    raise ValueError(f"--{name} needs --lora_r, the adapters' rank")
        if self.save_aligner is not None:
            self._check_save_aligner(Path(self.save_aligner), Path(output_dir))

    def _check_save_aligner(self, file: Path, output_dir: Path) -> None:
        if self.aligner == "identity" or self.alignment_weight == 0:
            raise ValueError(
                f"--save_aligner {file}: nothing is trained with --aligner {self.aligner} and "
                f"--alignment_weight {self.alignment_weight}"
            )
        if file.suffix != ".safetensors" or file.is_dir():
            raise ValueError(f"--save_aligner must be a .safetensors file, got {file}")
        if output_dir.resolve() in file.resolve().parents:
            raise ValueError(
                f"--save_aligner {file}: must lie outside --output_dir {output_dir}, whose safetensors files "
                "are read as the model's weights"
            )


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments, the paper's recipe as defaults; `options` says which of them work."""

    output_dir: str | None = field(
        default="runs/train", metadata={"help": "Receives the checkpoint and motion_report.json."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "AdamW's peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of warm-up, or below 1 their share of all steps."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples a device and step."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    # HfArgumentParser reads a union of three only with None in front.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "tensorboard, wandb, none ..."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false."})

    def __post_init__(self) -> None:
        if serving():
            return  # this process trains nothing and is in no process group
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and not torch.accelerator.is_available() and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            # Each process would train alone otherwise.
            self.use_cpu = True
        #: options with another value than their default, before transformers derives others from them
        self.given = changed_options(self)
        refuse_options(self)
        with naming_options(self.given):
            super().__post_init__()
        refuse_accelerate_options(self)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("--fp16 needs a GPU: on a CPU accelerate would leave it out; use --bf16")
        if self.n_gpu > 1:
            # One process would split each batch over model copies, out of the capture's reach.
            print("one process trains on one GPU; start torchrun or accelerate launch to use all of them")
            self._n_gpu = 1
        # transformers 5.2x renamed gradient_checkpointing to activation_checkpointing; the old names
        # mirror the new.
        if self.gradient_checkpointing:
            options = {"use_reentrant": False, **dict(self.gradient_checkpointing_kwargs or {})}  # type: ignore[arg-type]
            if unknown := sorted(options.keys() - _CHECKPOINTING):
                raise ValueError(
                    f"--gradient_checkpointing_kwargs: unknown {', '.join(unknown)}; it may hold "
                    f"{', '.join(sorted(_CHECKPOINTING))}"
                )
            if options["use_reentrant"]:
                raise ValueError(
                    "re-entrant gradient checkpointing drops the alignment's gradient: "
                    "leave use_reentrant false"
                )
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                if hasattr(self, name):
                    setattr(self, name, options)
