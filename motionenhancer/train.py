"""Fine-tune a video VLM with its attention pulled toward a motion prior.

`python -m motionenhancer.train` with no arguments does the whole path on a small world of moving shapes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .aligner import build_aligner
from .arguments import DataArguments, PriorArguments, parse_arguments
from .data import Sample, SkipLog, content_digest
from .dataset import MotionCollator, MotionDataset
from .extract import (
    default_toy,
    load_samples,
    make_priors,
    plan_priors,
    share_requests,
    use_toy_defaults,
)
from .prior import PriorSettings
from .report import RunReport
from .store import PriorStore
from .toy.world import ToyFolder
from .trainer import MotionTrainer
from .vlm import StudentFamily, load_student

PROG = "python -m motionenhancer.train"
#: Training arguments that change what is learnt.
_RECIPE = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "fp16",
)
TOY_RECIPE = Path(__file__).parent / "toy" / "recipe.yaml"


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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    classes = (StudentArguments, DataArguments, PriorArguments, TrainArguments)
    student, data, prior, training = parse_arguments(
        classes, arguments, prog=PROG, recipe=lambda chosen: TOY_RECIPE if chosen.student is None else None
    )
    try:
        run(student, data, prior, training)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    student: StudentArguments, data: DataArguments, prior: PriorArguments, training: TrainArguments
) -> RunReport:
    """One training run, from data to checkpoint; returns the report it wrote beside the checkpoint.

    Raises:
        ValueError, OSError: a setting, folder or file is wrong; nothing has been trained.
        FloatingPointError: the loss became NaN or infinite; the report names the samples.
    """
    settings = prior.settings()
    if not (math.isfinite(student.alignment_weight) and student.alignment_weight >= 0):
        raise ValueError(f"--alignment_weight must be a number >= 0, got {student.alignment_weight}")
    toy = use_toy_defaults(data, prior)
    if student.student is None:
        toy = toy or default_toy()
        student.student = str(toy.student)
    aligned = student.alignment_weight != 0 or student.measure_alignment
    report = RunReport(
        Path(training.output_dir or "runs/train"),
        identity=_identity(student, data, prior, settings, training),
    )
    main_process = PartialState().is_main_process
    if main_process:
        report.claim()
    skips = SkipLog()
    samples = load_samples(data, skips)
    if main_process:
        report.write("running")
        print(f"{len(samples)} samples from {data.data}; student {student.student}; output {report.folder}")
    try:
        if not Path(student.student).is_dir():
            raise ValueError(
                f"--student {student.student}: no such folder; give a transformers folder on disk"
            )
        model, processor, family = load_student(
            # Mixed precision keeps weights in float32 and casts as it computes.
            student.student,
            attn_implementation=student.attn_implementation,
            dtype=torch.float32,
        )
        sampling = _sampling(student, family)
        keys: dict[str, str] = {}
        grids: set[tuple[int, int, int]] = set()
        if aligned:
            samples, keys, grids = _priors(samples, student, prior, settings, skips, report, toy)
        dataset = MotionDataset(
            samples,
            family,
            processor,
            keys=keys,
            store=PriorStore(Path(prior.prior_dir)),
            source=prior.prompt_source,
            **sampling,
            max_pixels=student.max_pixels,
        )
        vision_rate = student.vision_learning_rate
        if vision_rate is None:
            vision_rate = training.learning_rate / 5
        trainer = MotionTrainer(
            model=model,
            args=training,
            train_dataset=dataset,
            data_collator=MotionCollator(family, processor),
            processing_class=processor,
            alignment_weight=student.alignment_weight,
            alignment_loss=student.alignment_loss,
            aligner=_aligner(student, grids, training.seed),
            confidence_gate=student.confidence_gate,
            learning_rates=lambda name: vision_rate if family.in_vision_tower(name) else None,
            measure_alignment=student.measure_alignment and bool(keys),
        )
        result = trainer.train(resume_from_checkpoint=_checkpoint(training))
        trainer.save_model()
    except BaseException as error:
        if main_process:
            report.content["error"] = str(error) or type(error).__name__
            report.write("failed")
        raise
    if main_process:
        for sample, reason in trainer.skipped.items():
            skips.add("unreadable while training", id=sample, detail=reason)
        report.content["alignment"] = trainer.counts
        report.content["training"] = {"metrics": result.metrics, "log": trainer.state.log_history}
        report.content["skipped"] = skips.to_json()
        report.write("finished")
        if skips.total:
            print(skips.summary())
        print(f"checkpoint and {report.path.name} in {report.folder}")
    return report


def _sampling(student: StudentArguments, family: StudentFamily) -> dict[str, Any]:
    """The family's frames of a clip with whatever flags change of them."""
    if student.num_frames is not None and student.video_fps is not None:
        raise ValueError("--num_frames and --video_fps exclude each other: give one of them")
    for name in ("num_frames", "video_fps", "max_frames"):
        value = getattr(student, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    if student.num_frames is not None:
        return {"num_frames": student.num_frames}
    if student.video_fps is None and family.num_frames is not None:
        return {"num_frames": family.num_frames}
    fps = 1.0 if student.video_fps is None else student.video_fps
    return {"fps": fps, "max_frames": student.max_frames}


def _priors(
    samples: list[Sample],
    student: StudentArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    skips: SkipLog,
    report: RunReport,
    toy: ToyFolder | None,
) -> tuple[list[Sample], dict[str, str], set[tuple[int, int, int]]]:
    """Priors in the store for all samples that can have one → usable samples, sample id → key, grids met."""
    state = PartialState()
    assert prior.teacher is not None
    store, name = PriorStore(Path(prior.prior_dir)), prior.teacher_id(state.device)
    requests = plan_priors(samples, name, settings, prior.prompt_source, skips)
    missing = sum(request.key not in store for request in requests)
    untrained = toy is not None and Path(prior.teacher) == toy.teacher
    if state.is_main_process:
        print(f"teacher {prior.teacher}: {len(requests) - missing} priors stored, {missing} to make")
        if untrained:
            print(
                "the toy teacher is untrained (random weights): its priors exercise the path "
                "and carry no meaning"
            )
    if student.prior_source == "store" and missing:
        raise ValueError(
            f"--prior_source store: {missing} of {len(requests)} priors are missing in {prior.prior_dir}; "
            "make them with "
            f"python -m motionenhancer.extract --teacher {prior.teacher} ..., or use --prior_source hybrid"
        )
    made = make_priors(
        share_requests(requests, state.num_processes)[state.process_index],
        store,
        settings,
        lambda: prior.load(state.device),
        skips,
        measure_roundtrip=prior.measure_roundtrip,
    )
    everyone = gather_object([made])
    keys = {k: v for part in everyone for k, v in part.keys.items()}
    unusable = {s for part in everyone for s in part.unusable}
    report.content["teacher"] = {
        "path": prior.teacher,
        "id": name,
        "trained": False if untrained else None,
        "roundtrip": next((part.roundtrip for part in everyone if part.roundtrip), None),
    }
    report.content["samples"] = [entry for part in everyone for entry in part.described]
    grids = {tuple(entry["grid"]) for part in everyone for entry in part.described}
    usable = [s for s in samples if s.id not in unusable]
    if not usable:
        raise ValueError(f"no sample is left to train on. {skips.summary()}")
    if not keys and student.alignment_weight != 0:
        raise ValueError(
            f"none of the {len(samples)} samples has a prior, so nothing would be aligned; "
            f"use --alignment_weight 0 for plain fine-tuning. {skips.summary()}"
        )
    return usable, keys, grids


def _aligner(
    student: StudentArguments, grids: set[tuple[int, int, int]], seed: int
) -> torch.nn.Module | None:
    if student.alignment_weight == 0 or not grids:
        return None
    if len(grids) > 1 and student.aligner == "mlp":
        listed = ", ".join("×".join(map(str, grid)) for grid in sorted(grids))
        raise ValueError(
            f"--aligner mlp needs priors of one grid, found {listed}; use pointwise, conv or identity"
        )
    return build_aligner(student.aligner, sorted(grids)[0], seed=seed)


def _identity(
    student: StudentArguments,
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
    training: TrainArguments,
) -> dict[str, Any]:
    """What makes this run this run: change any of it and the output folder belongs to another."""
    return {
        "student": student.student,
        "teacher": prior.teacher,
        "data": data.data,
        "data_digest": content_digest(data.data or "") if Path(data.data or "").is_file() else None,
        "video_root": data.video_root,
        "limit": data.limit,
        "prior": asdict(settings),
        "prompt_source": prior.prompt_source,
        "teacher_options": {k: str(v) for k, v in prior.identity(PartialState().device).items()},
        **{
            k: v
            for k, v in asdict(student).items()
            if k not in ("student", "prior_source", "attn_implementation")
        },
        **{k: v if isinstance(v := getattr(training, k), int | float | None) else str(v) for k in _RECIPE},
    }


def _checkpoint(training: TrainArguments) -> str | None:
    """The newest whole checkpoint of this run, if it was cut short."""
    if training.resume_from_checkpoint:
        return training.resume_from_checkpoint
    folders = Path(training.output_dir or "").glob("checkpoint-*")
    numbered = {int(f.name[11:]): f for f in folders if f.is_dir() and f.name[11:].isdecimal()}
    return next((str(numbered[n]) for n in sorted(numbered, reverse=True) if _is_whole(numbered[n])), None)


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last: without it, the run was killed while it saved."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
