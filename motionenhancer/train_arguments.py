"""The flags of `python -m motionenhancer.train` beyond those of data and priors."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


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
            "help": "store: every prior must be in --prior_dir; hybrid: missing ones are made first.",
            "choices": ["store", "hybrid"],
        },
    )
    alignment_weight: float = field(default=1.0, metadata={"help": "λ; 0 is plain fine-tuning."})
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
    confidence_gate: float = field(
        default=0.0,
        metadata={"help": "Follow priors less confident than this proportionally less; 0 is no gate."},
    )
    measure_alignment: bool = field(default=False, metadata={"help": "Log loss_align also when λ is 0."})
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


@dataclass
class TrainArguments(TrainingArguments):
    """All of transformers' TrainingArguments, the paper's recipe as defaults."""

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
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns must stay false: samples carry their priors")
        # transformers 5.2x renamed gradient_checkpointing to activation_checkpointing; the old names
        # mirror the new.
        if self.gradient_checkpointing:
            options = {"use_reentrant": False, **dict(self.gradient_checkpointing_kwargs or {})}  # type: ignore[arg-type]
            if options["use_reentrant"]:
                raise ValueError(
                    "re-entrant gradient checkpointing drops the alignment's gradient: "
                    "leave use_reentrant false"
                )
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                if hasattr(self, name):
                    setattr(self, name, options)
