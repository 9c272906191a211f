"""Every flag of every command, once: the dataclasses that the code itself uses.

How a prior is read is `motionenhancer.priors.prior.PriorSettings`, whose fields are flags too.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from .alignment.weight import SCHEDULES, AlignmentSchedule
from .evaluation.benchmarks import BENCHMARKS
from .flags import setting
from .options import (
    WORKS,
    changed_options,
    naming_options,
    refuse_accelerate_options,
    refuse_options,
)
from .priors.engine import ENGINES, Engine, open_engine
from .teachers import Teacher, load_teacher, teacher_dtype, teacher_id
from .teachers.plan import size_multiple
from .teachers.text_cache import CachedTextTeacher, TextCache, encoder_id

SOURCES = ("store", "online", "hybrid")

#: Keys that torch's checkpointing and transformers read. Layers would be handed any other, and ignore it.
_CHECKPOINTING = frozenset(
    str.split("use_reentrant preserve_rng_state determinism_check debug early_stop every_n_layers offload")
)


@dataclass
class DataArguments:
    """Where the clips and their conversations are."""

    data: str | None = setting(
        None, "LLaVA json/jsonl, or messages+videos jsonl. Default: the toy world, made on first use."
    )
    video_root: str | None = setting(
        None, "Folder that video paths are relative to. Default: the data file's."
    )
    limit: int | None = setting(None, "Use only the first so many samples.")


@dataclass
class PriorArguments:
    """Which teacher reads the clips, how it is loaded, and where its priors are kept."""

    teacher: str | None = setting(
        None, "Diffusers folder of a video diffusion model. Default: the toy teacher."
    )
    prior_dir: str = setting("runs/priors", "Folder of stored priors.")
    prompt_source: str = setting("both", "Text given to the teacher.", choices=["both", "question", "answer"])
    teacher_dtype: str = setting(
        "auto",
        "auto: bfloat16 on CUDA, float32 on the CPU.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    teacher_size: str | None = setting(None, "HEIGHTxWIDTH of the clips. Default: as the model was trained.")
    teacher_frames: int | None = setting(None, "Most frames of a clip. Default: as the model was trained.")
    vae_tiling: bool = setting(False, "Encode in tiles: less memory, other latents.")
    offload_text_encoder: bool = setting(False, "Leave the text encoder on the CPU.")
    text_cache: str | None = setting(
        None, "Folder that keeps the teacher's text embeddings for this and later runs."
    )
    compile_teacher: bool = setting(False, "torch.compile the transformer's blocks.")
    split_batch: bool = setting(False, "Evaluate guidance's two texts one after the other.")
    measure_roundtrip: bool = setting(
        False, "Also invert and rebuild one clip without guidance, and report the error."
    )

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

    def cost_options(self, device: torch.device | str, *, cached: bool = False) -> dict[str, Any]:
        """Return what `teacher_cost` needs to know of how the teacher is loaded.

        Args:
            device: that it runs on.
            cached: the text cache holds all texts, so that no text encoder is loaded.
        """
        offloaded = self.offload_text_encoder and torch.device(device).type != "cpu"
        encoder = "none" if cached and self.text_cache is not None else "host" if offloaded else "device"
        return {**self.identity(device), "split_batch": self.split_batch, "text_encoder": encoder}

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

    def absolute(self) -> PriorArguments:
        """Return the same with absolute paths: Ray's actors start in folders of their own."""
        names = ("teacher", "prior_dir", "text_cache")
        paths = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: os.path.abspath(value) for name, value in paths.items()})

    def texts(self, device: torch.device | str) -> TextCache | None:
        """The cache of text embeddings, if there is to be one."""
        if self.text_cache is None:
            return None
        assert self.teacher is not None
        dtype = self.identity(device)["dtype"]
        return TextCache(Path(self.text_cache), encoder_id(self.teacher, dtype))


@dataclass
class MakerArguments:
    """Where priors are made; none of it changes a prior."""

    prior_engine: str = setting(
        "local",
        "local: a teacher in each process. ray: teachers on the GPUs of a Ray cluster.",
        choices=list(ENGINES),
        aliases=["--engine"],
    )
    prior_workers: int = setting(
        2,
        "Threads of a process that decode clips ahead of the teacher.",
        aliases=["--decode_workers", "--decode-workers"],
    )
    ray_address: str | None = setting(
        None, "Cluster to join. Default: a running one, or one on this machine."
    )
    ray_workers: int | None = setting(None, "Teachers. Default: one a GPU of the cluster, or one in all.")
    ray_cpus: int | None = setting(None, "Cores that a teacher reserves and computes with. Default: 1.")

    def __post_init__(self) -> None:
        counts = {"prior_workers": " (--decode_workers)", "ray_workers": "", "ray_cpus": ""}
        for name, older in counts.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}{older} must be at least 1, got {value}")
        for name in ("ray_address", "ray_workers", "ray_cpus"):
            if self.prior_engine != "ray" and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs --prior_engine ray, got --prior_engine {self.prior_engine}")

    def open(self) -> AbstractContextManager[Engine]:
        """Open the engine; see `open_engine`."""
        return open_engine(
            self.prior_engine,
            decode_workers=self.prior_workers,
            address=self.ray_address,
            actors=self.ray_workers,
            cpus=self.ray_cpus,
        )


@dataclass
class ExtractArguments:
    """How the command runs."""

    dry_run: bool = setting(False, "Print evaluations, bytes and memory, and load no model.")


@dataclass
class AgreementArguments:
    """What is compared."""

    noise_levels: str = setting("50,100,200,400,600,800", "Training timesteps of the single evaluations.")
    report: str | None = setting(None, "Also write the table as json to this file.")


@dataclass
class StudentArguments:
    """The model to tune and how strongly it is pulled."""

    student: str | None = setting(
        None, "Transformers folder of a video VLM. Default: the toy student, trained with its recipe."
    )
    prior_source: str = setting(
        "hybrid",
        "store: every prior must be in --prior_dir; online: all are made while training, none "
        "is kept; hybrid: what --prior_dir lacks is made while training and kept there.",
        choices=list(SOURCES),
    )
    alignment_weight: float = setting(1.0, "λ; 0 is plain fine-tuning.")
    alignment_schedule: str = setting("constant", "λ over the run.", choices=list(SCHEDULES))
    alignment_warmup: float = setting(0.0, "Steps over which λ rises, or below 1 their share of all steps.")
    alignment_end_weight: float = setting(0.0, "λ where a linear or cosine schedule ends.")
    vision_learning_rate: float | None = setting(
        None, "Peak learning rate of the vision tower. Default: a fifth of the rest."
    )
    alignment_loss: str = setting("l2", "Distance of two maps.", choices=["l2", "mse", "kl"])
    aligner: str = setting(
        "mlp",
        "Module between student and prior, thrown away after training.",
        choices=["mlp", "identity", "pointwise", "conv"],
    )
    save_aligner: str | None = setting(
        None, "Safetensors file outside --output_dir that receives the trained aligner."
    )
    prior_temperature: float = setting(
        1.0, "The prior's rows are raised to one over this: below 1 they become sharper."
    )
    confidence_gate: float = setting(
        0.0, "Follow priors less confident than this proportionally less; 0 is no gate."
    )
    measure_alignment: bool = setting(False, "Log loss_align also when λ is 0.")
    lora_r: int = setting(0, "Rank of low-rank adapters trained instead of all weights; 0 is none.")
    lora_alpha: int | None = setting(None, "The adapters' scale times their rank. Default: twice the rank.")
    lora_dropout: float = setting(0.0, "Dropout before the adapters.")
    lora_target: str = setting(
        "language",
        "Layers with adapters: all linear ones of the language model, all of the model, or "
        "names between commas, or those after the last dot of a name: q_proj,v_proj.",
    )
    lora_merge: bool = setting(False, "Save the whole model, adapters added into it, and no adapter.")
    dry_run: bool = setting(False, "Say what the run would do, and stop: no weights are read.")
    video_fps: float | None = setting(None, "Frames a second. Default: 1.")
    num_frames: int | None = setting(
        None, "Frames of a clip, evenly. Default: the family's, 8 for InternVL, else by rate."
    )
    max_frames: int = setting(64, "Most frames of one clip by rate.")
    max_pixels: int | None = setting(None, "Most pixels of a frame, before patching.")
    attn_implementation: str = setting("sdpa", "The student's attention.")

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
class OnlineArguments:
    """When a training's priors are made."""

    priors_first: bool = setting(
        False,
        "hybrid: make what is missing before training and let the teacher go, where teacher "
        "and student do not fit into memory together.",
    )
    prior_prefetch: int = setting(1, "Steps ahead of which the teacher reads clips; 0 waits at every step.")
    agreement_clips: int = setting(
        4,
        "renoise: read this many clips by the full procedure too, at the start, and print how "
        "far both agree; 0 leaves it out.",
    )

    def __post_init__(self) -> None:
        for name in ("prior_prefetch", "agreement_clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")

    def check(self, source: str) -> None:
        """Refuse options that do nothing under `--prior_source source`.

        Raises:
            ValueError: names the flag, what it is and what would be right.
        """
        if self.priors_first and source != "hybrid":
            raise ValueError(
                f"--priors_first needs --prior_source hybrid, got {source}: "
                "store makes no priors and online keeps none"
            )
        if not self.priors_first and source != "store":
            return
        made = "--prior_source store" if source == "store" else "--priors_first"
        usual = OnlineArguments()
        for name in ("prior_prefetch", "agreement_clips"):
            value = getattr(self, name)
            if value and value != getattr(usual, name):
                raise ValueError(
                    f"--{name} {value} with {made}: no prior is made while training; leave it out, or use "
                    "--prior_source online or hybrid"
                )


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments, the paper's recipe as defaults."""

    works: ClassVar[frozenset[str]] = WORKS

    output_dir: str | None = setting("runs/train", "Receives the checkpoint and motion_report.json.")
    learning_rate: float = setting(1e-05, "AdamW's peak learning rate.")
    weight_decay: float = setting(0.1, "AdamW's weight decay.")
    lr_scheduler_type: str = setting("cosine", "Learning-rate schedule.")
    warmup_steps: float = setting(0.03, "Steps of warm-up, or below 1 their share of all steps.")
    num_train_epochs: float = setting(1.0, "Passes over the data.")
    per_device_train_batch_size: int = setting(1, "Samples a device and step.")
    logging_steps: float = setting(10, "Steps between log lines.")
    # HfArgumentParser reads a union of three only with None in front.
    report_to: None | str | list[str] = setting("none", "tensorboard, wandb, none ...")  # noqa: RUF036
    remove_unused_columns: bool = setting(False, "Must stay false.")

    def __post_init__(self) -> None:
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


@dataclass
class ReportArguments:
    """What is shown of clips."""

    report_samples: int = setting(8, "Clips on the page; after a training, 0 writes no page.")

    def __post_init__(self) -> None:
        if self.report_samples < 0:
            raise ValueError(f"--report_samples must be at least 0, got {self.report_samples}")


@dataclass
class LookArguments:
    """What is looked at, and where its pictures go."""

    run: str | None = setting(None, "Output folder of a training: its page is written anew.", positional=True)
    id: list[str] | None = setting(None, "Only these samples, or priors whose key begins like this.")
    video: str | None = setting(None, "Look at this clip, with --text and a teacher, a student or both.")
    text: str | None = setting(None, "What happens in the clip.")
    student: str | None = setting(None, "With --video: transformers folder of a video VLM.")
    num_frames: int | None = setting(None, "With --student: frames of the clip that it is shown, evenly.")
    output: str | None = setting(
        None, "The page. Default: report.html in RUN, look.html in --prior_dir or here."
    )
    png: str | None = setting(None, "Also draw the first clip's frames and maps to this file.")
    mp4: str | None = setting(None, "Also write the first clip with its maps over it to this file.")
    word: list[str] | None = setting(None, "Words of --png and --mp4. Default: those that move most.")
    smooth: bool = setting(False, "Interpolate --png and --mp4 between the grid's cells.")

    def __post_init__(self) -> None:
        if self.run is not None and self.video is not None:
            raise ValueError("run and --video exclude each other")
        if (self.video is None) != (self.text is None):
            raise ValueError("--video and --text go together")
        for name in ("student", "num_frames"):
            if self.video is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} goes with --video")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"--num_frames must be at least 1, got {self.num_frames}")
        if self.word is not None and self.png is None and self.mp4 is None:
            raise ValueError("--word goes with --png or --mp4")


@dataclass
class EvalArguments:
    """What is asked, who answers, and how answers are scored."""

    student: str | None = setting(None, "Transformers folder of a video VLM. Default: the toy student.")
    predictions: str | None = setting(
        None, "Score these answers, json of question id to output, instead of asking a student."
    )
    benchmark: str = setting("toy", "Whose questions and rules.", choices=list(BENCHMARKS))
    data: str | None = setting(
        None, "The benchmark's file: video_info.meta.jsonl, video_perspective.json. Default: the toy's."
    )
    video_root: str | None = setting(None, "Folder of the clips. Default: the data file's.")
    output_dir: str | None = setting(
        None, "Receives answers, results.jsonl, scores.json, a submission. Default: runs/eval."
    )
    limit: int | None = setting(None, "Use only the first so many questions.")
    prompt: str | None = setting(
        None, "Request in place of the benchmark's own, with {question} and {options}."
    )
    answer_hidden: bool = setting(
        False, "Also ask what has no public answer: not scored, but in the submission."
    )
    letter_rule: str = setting(
        "published",
        "MotionBench: published is the authors' own reading of a letter, lone is stricter.",
        choices=["published", "lone"],
    )
    option_rule: str = setting(
        "caseless",
        "FAVOR-Bench: whether case matters where one option contains another: published is yes.",
        choices=["caseless", "published"],
    )
    num_frames: int | None = setting(None, "Frames of a clip, evenly. Default: 8 for InternVL, else by rate.")
    video_fps: float | None = setting(None, "Frames a second. Default: 1, toy 8.")
    min_frames: int | None = setting(None, "Fewest frames by rate. Default: 4.")
    max_frames: int | None = setting(None, "Most frames by rate. Default: 768.")
    max_pixels: int | None = setting(
        None, "Most pixels of a frame, 0 for the processor's own. Default: 151200."
    )
    batch_size: int = setting(4, "Questions a process answers at once.")
    max_new_tokens: int | None = setting(
        None, "Length of an answer. Default: MotionBench 16, FAVOR-Bench 256."
    )
    dtype: str = setting(
        "auto", "Weights; auto: as stored.", choices=["auto", "float32", "bfloat16", "float16"]
    )
    attn_implementation: str = setting("sdpa", "The student's attention.")
    workers: int = setting(0, "Processes that decode clips ahead.")
    bootstrap_samples: int = setting(10000, "Resamples; 0: no intervals.")
    bootstrap_unit: str = setting("question", "What is resampled.", choices=["question", "video"])
    seed: int = setting(0, "Seed of the bootstrap.")
    compare: list[str] | None = setting(None, "Two scored runs, A and B: compare them and do nothing else.")
    task: str | None = setting(None, "With --compare: only this task.")

    def __post_init__(self) -> None:
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"--compare must name two runs, got {len(self.compare)}")
        if self.task is not None and self.compare is None:
            raise ValueError("--task goes with --compare")
        if self.predictions is not None and self.student is not None:
            raise ValueError("--student and --predictions exclude each other")
        if self.data is None and self.benchmark != "toy":
            wants = {"motionbench": "video_info.meta.jsonl", "favor": "video_perspective.json"}
            if self.compare is None:
                raise ValueError(f"--benchmark {self.benchmark} needs --data, its {wants[self.benchmark]}")
        for name, least in (
            ("limit", 1),
            ("batch_size", 1),
            ("max_new_tokens", 1),
            ("workers", 0),
            ("bootstrap_samples", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
