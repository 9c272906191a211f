"""The flags of the commands: dataclasses that the code itself uses. Each flag is declared once.

Flags of priors are in `priors.arguments` and `priors.engine`, flags of transformers' Trainer in
`training.arguments`, and flags of `eval` in `evaluation.arguments`. The fields of `priors.prior_settings`,
which say how a prior is read, are flags too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .alignment.aligner import LOSSES, check_normalize
from .alignment.weight import SCHEDULES, AlignmentSchedule
from .data.sources import check_source
from .flags import MAX_SEED, Settings, near, setting
from .hub import model_folder
from .priors.arguments import PriorArguments
from .priors.engine import MakerArguments
from .students import StudentFamily

MAX_FRAMES = 64
"""Default maximum number of frames of a clip in training, where frames are taken at a rate."""
ACTIONS = ("list", "verify", "prune")
"""What `store` does with a folder of priors."""
SOURCES = ("store", "online", "hybrid")


def checked_pixels(most: int | None, family: StudentFamily) -> int | None:
    """Refuse a pixel limit where the processor of the family gives all frames one size."""
    if most is not None and not family.sized:
        raise ValueError(
            f"--max_pixels {most} does nothing with {family.name}, whose processor gives all frames one "
            "size; leave it out"
        )
    return most


@dataclass
class DataArguments(Settings):
    """Samples and clips."""

    data: str | None = setting(
        None, "File of samples (json, jsonl, parquet), Hub id, or a benchmark's file; see docs/data.md."
    )
    video_root: str | None = setting(None, "Folder of clips. Default: the folder of --data.", exists="folder")
    limit: int | None = setting(None, "Use only the first N samples or questions.", least=1)

    #: Whether --data may be a folder of json files.
    data_folder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None:
            check_source(self.data, "--data", folder=self.data_folder)


@dataclass
class ToyArguments(Settings):
    """The toy world."""

    output_dir: str = setting("runs/toy", "Folder to write.")
    clips: int = setting(64, "Number of training clips.", least=1)
    test_clips: int | None = setting(None, "Number of test clips. Default: a quarter of --clips.", least=1)
    seed: int = setting(0, "Seed of the clips.", least=0, most=MAX_SEED)
    lesson: str = setting(
        "tasks",
        "tasks: six kinds of questions, and a student that can name objects; motion: one kind of question "
        "about one moving object, and a student with random weights.",
        choices=("tasks", "motion"),
    )


@dataclass
class StoreArguments(Settings):
    """The action, and the folder of priors."""

    action: str | None = setting(
        None,
        "list: print every prior; verify: read every prior and set damaged files aside; prune: remove the "
        "files that were set aside, and temporary files of runs that died.",
        metavar="|".join(ACTIONS),
        positional=True,
    )
    prior_dir: str = setting(PriorArguments.prior_dir, "Folder of stored priors.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action not in ACTIONS:
            said = "none" if self.action is None else f"{self.action}{near(self.action, ACTIONS)}"
            raise ValueError(f"give one of {', '.join(ACTIONS)}, got {said}")
        if not Path(self.prior_dir).is_dir():
            raise ValueError(f"--prior_dir {self.prior_dir}: no such folder")


@dataclass
class ExtractArguments(Settings):
    """How the command runs."""

    dry_run: bool = setting(False, "Print evaluations, disk space and memory, and load no model.")


@dataclass
class AgreementArguments(Settings):
    """What is compared."""

    noise_levels: str = setting("50,100,200,400,600,800", "Noise levels to compare, separated by commas.")
    report: str | None = setting(None, "Also write the table as json to this file.")


@dataclass
class ShownArguments(Settings):
    """The student, and the frames that it sees."""

    student: str | None = setting(
        None,
        "Folder of a video VLM as transformers saves it, or a Hub id (owner/model@revision). Default without "
        "--data: the toy student.",
    )
    num_frames: int | None = setting(
        None,
        "Number of evenly spaced frames. Default: the family's number (InternVL: 8), else frames at "
        "--video_fps; eval with --benchmark toy: as in the student's training, or 8.",
        least=1,
    )
    video_fps: float | None = setting(None, "Frames per second. Default: 1.", above=0)
    max_frames: int | None = setting(
        None, "Maximum number of frames at --video_fps. Default: 64; eval: 768.", least=1
    )
    attn_implementation: str = setting(
        "sdpa", "Attention implementation of the student, by transformers' name."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames is not None and self.video_fps is not None:
            raise ValueError("--num_frames and --video_fps exclude each other: give one of them")


@dataclass
class StudentArguments(ShownArguments):
    """The student, and how it is aligned."""

    prior_source: str = setting(
        "hybrid",
        "store: every prior must be in --prior_dir; online: all priors are made while training and "
        "not kept; hybrid: missing priors are made while training and kept in --prior_dir.",
        choices=SOURCES,
    )
    alignment_weight: float = setting(1.0, "λ, the weight of alignment; 0 is plain fine-tuning.", least=0)
    alignment_schedule: str = setting("constant", "How λ changes over the run.", choices=SCHEDULES)
    alignment_warmup: float = setting(0.0, "Steps in which λ rises; below 1: a share of all steps.", least=0)
    alignment_end_weight: float = setting(0.0, "λ at the end of a linear or cosine schedule.", least=0)
    vision_learning_rate: float | None = setting(
        None, "Learning rate of the vision tower. Default: a fifth of --learning_rate.", least=0
    )
    alignment_layers: list[str] | None = setting(
        None,
        "Layers whose attention is read: numbers from 0, or all. Default: all layers with global attention, "
        "without a sliding window.",
    )
    alignment_heads: list[int] | None = setting(None, "Heads to read: numbers from 0. Default: all.")
    alignment_reduce: str = setting(
        "mean",
        "mean: the mean over layers and heads is aligned; none: the map of every layer and head is aligned.",
        choices=["mean", "none"],
    )
    alignment_loss: str = setting(
        "l2",
        "Distance of two rows. l2: norm of the difference; squared: squared norm; mse: mean squared "
        "difference; kl: KL divergence.",
        choices=LOSSES,
    )
    normalize_rows: bool = setting(
        True, "Scale the rows of both maps to sum to one; false: compare the attention as it is."
    )
    aligner: str = setting(
        "mlp",
        "Module that the student's maps pass through before they are compared; not saved with the model.",
        choices=["mlp", "identity", "pointwise", "conv"],
    )
    save_aligner: str | None = setting(None, "Safetensors file for the trained aligner.")
    prior_temperature: float = setting(1.0, "Temperature of the prior; below 1: sharper rows.", above=0)
    confidence_gate: float = setting(
        0.0, "Priors with lower confidence get a smaller weight; 0: off.", least=0
    )
    measure_alignment: bool = setting(False, "Log loss_align even if λ is 0.")
    lora_r: int = setting(
        0, "Rank of LoRA adapters, which are trained instead of the weights; 0: no adapters.", least=0
    )
    lora_alpha: int | None = setting(
        None, "The adapters' output is multiplied by lora_alpha / lora_r. Default: 2 · lora_r.", least=1
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapters.", least=0, below=1)
    lora_target: str = setting(
        "language",
        "Linear layers with adapters. language: all of the language model; all: all of the model; or "
        "names or last parts of names, separated by commas: q_proj,v_proj.",
    )
    lora_merge: bool = setting(False, "Merge the adapters into the model, and save the whole model only.")
    sample_cache_mb: int = setting(
        0,
        "Megabytes of encoded training samples that each data-loading worker keeps between epochs; 0: none.",
        least=0,
    )
    dry_run: bool = setting(False, "Print what the run would do, and stop. No weights are read.")
    max_pixels: int | None = setting(None, "Maximum number of pixels of a frame, before patching.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is not None:
            self.student = str(model_folder(self.student, "--student", dry_run=self.dry_run))

    @property
    def aligned(self) -> bool:
        """Whether priors are needed."""
        return self.alignment_weight != 0 or self.measure_alignment

    def frames(self, family: StudentFamily) -> dict[str, Any]:
        """Number and size of the frames that a student sees, as options of `MotionDataset`.

        Raises:
            ValueError: --max_frames or --max_pixels would do nothing.
        """
        size = {"max_pixels": checked_pixels(self.max_pixels, family)}
        count = self.num_frames or (family.num_frames if self.video_fps is None else None)
        if count is None:
            return {**size, "fps": self.video_fps or 1.0, "max_frames": self.max_frames or MAX_FRAMES}
        if self.max_frames not in (None, MAX_FRAMES):
            why = "--num_frames" if self.num_frames else f"{family.name} by default"
            raise ValueError(
                f"--max_frames {self.max_frames} has no effect: the student gets {count} frames of each clip "
                f"({why}); leave it out, or give --video_fps without --num_frames"
            )
        return {**size, "num_frames": count}

    def attention(self) -> dict[str, Any]:
        """Which layers and heads are read, as options of `capture_attention`.

        Raises:
            ValueError: a layer is not a number.
        """
        layers: Any = self.alignment_layers
        if layers == ["all"]:
            layers = "all"
        elif layers is not None:
            if not all(layer.isdecimal() for layer in layers):
                raise ValueError(f"--alignment_layers must be layer numbers or all, got {layers}")
            layers = [int(layer) for layer in layers]
        return {"layers": layers, "heads": self.alignment_heads, "reduce": self.alignment_reduce}

    def schedule(self) -> AlignmentSchedule:
        """λ over the run.

        Raises:
            ValueError: a flag of the schedule is out of range.
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
        self.attention()
        check_normalize(self.normalize_rows, self.alignment_loss, self.prior_temperature)
        for name in ("alignment_layers", "alignment_heads", "alignment_reduce"):
            if not self.aligned and getattr(self, name) != getattr(StudentArguments, name):
                raise ValueError(
                    f"--{name} does nothing with --alignment_weight 0, as no attention is read; leave it "
                    "out, or give --measure_alignment"
                )
        if not self.lora_r:
            for name in ("lora_alpha", "lora_dropout", "lora_target", "lora_merge"):
                if getattr(self, name) != getattr(StudentArguments, name):
                    raise ValueError(f"--{name} needs --lora_r, the rank of the adapters")
        if self.save_aligner is None:
            return
        file = Path(self.save_aligner)
        if self.aligner == "identity" or self.alignment_weight == 0:
            raise ValueError(
                f"--save_aligner {file}: nothing is trained with --aligner {self.aligner} and "
                f"--alignment_weight {self.alignment_weight}"
            )
        if file.suffix != ".safetensors" or file.is_dir():
            raise ValueError(f"--save_aligner must be a .safetensors file, got {file}")
        if Path(output_dir).resolve() in file.resolve().parents:
            raise ValueError(
                f"--save_aligner {file}: must lie outside --output_dir {output_dir}, whose safetensors files "
                "are read as the model's weights"
            )


@dataclass
class OnlineArguments(Settings):
    """When the priors of a training run are made."""

    priors_first: bool = setting(
        False,
        "With --prior_source hybrid: make missing priors before training, then free the teacher. For a "
        "teacher and a student that do not fit into memory together.",
    )
    prior_prefetch: int = setting(
        1, "Number of steps for which priors are made ahead; 0: each step waits for its priors.", least=0
    )
    agreement_clips: int = setting(
        4,
        "With --prior_mode renoise: number of clips that the full procedure reads too, at the start. The "
        "agreement of both is printed. 0: none.",
        least=0,
    )

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
        made = "--prior_source store" if source == "store" else "--priors_first" if self.priors_first else ""
        for name in ("prior_prefetch", "agreement_clips"):
            value = getattr(self, name)
            if made and value not in (0, getattr(OnlineArguments, name)):
                raise ValueError(
                    f"--{name} {value} with {made}: no prior is made while training; leave it out, or use "
                    "--prior_source online or hybrid"
                )

    def check_teachers(self, source: str, prior: PriorArguments, where: MakerArguments) -> None:
        """Refuse teachers whose priors cannot be made while training; see `PriorArguments.waits`.

        Raises:
            ValueError: names the flag and what would be right.
        """
        if source == "online" and (why := prior.waits(where)):
            raise ValueError(f"--prior_source online: {why}; use hybrid or store")


@dataclass
class ReportArguments(Settings):
    """The page of the run."""

    report_samples: int = setting(8, "Number of clips on the page; 0: a training writes no page.", least=0)


@dataclass
class LookArguments(Settings):
    """What is shown, and the files that are written."""

    run: str | None = setting(
        None, "Output folder of a training. Its page is rewritten.", metavar="[RUN]", positional=True
    )
    id: list[str] | None = setting(
        None, "Show only samples with these ids, or priors whose keys begin with these letters."
    )
    video: str | None = setting(None, "Show this clip with --text, read by --teacher, --student or both.")
    text: str | None = setting(None, "With --video: text about the clip.")
    student: str | None = setting(None, "With --video: folder of a video VLM.")
    num_frames: int | None = setting(None, "With --student: number of evenly spaced frames.", least=1)
    output: str | None = setting(
        None,
        "File of the page. Default: report.html in RUN, else look.html in --prior_dir or the current folder.",
    )
    png: str | None = setting(None, "Also draw frames and maps of the first clip to this file.")
    mp4: str | None = setting(None, "Also write the first clip, overlaid with its maps, to this file.")
    word: list[str] | None = setting(None, "Words for --png and --mp4. Default: the three best by score.")
    smooth: bool = setting(False, "Interpolate the maps of --png and --mp4 between the grid's cells.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is not None and self.video is not None:
            raise ValueError("give RUN or --video, not both")
        if self.run is not None and not Path(self.run).is_dir():
            raise ValueError(
                f"RUN must be the output folder of a training, got {self.run}; to show one clip, give "
                "--video FILE --text TEXT"
            )
        if (self.video is None) != (self.text is None):
            raise ValueError("--video needs --text, and --text needs --video")
        for name in ("student", "num_frames"):
            if self.video is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs --video")
        if self.word is not None and self.png is None and self.mp4 is None:
            raise ValueError("--word needs --png or --mp4")
