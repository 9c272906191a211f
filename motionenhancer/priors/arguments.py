"""The flags of priors: which teachers read the clips, and how they are loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data import Sample, SkipLog
from ..files import read_json
from ..flags import Settings, setting
from ..hub import model_folder
from ..teachers import Teacher, load_teacher, teacher_dtype, teacher_id
from ..teachers.plan import plan_teacher, size_multiple
from ..teachers.text_cache import TextCache, encoder_id
from .combination import CombinedStore, Weights
from .engine import MakerArguments
from .own_maps import OwnMaps
from .prior_settings import PriorSettings, check_settings
from .reader import Grid, Source
from .regions import Regions
from .requests import PriorRequest, request_priors
from .storage import prior_keys

DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Names that --teacher takes beside folders: the data file's own regions, and the student that is trained.
REGIONS, SELF = "regions", "self"
#: Flags that every kind of teacher has. The others say how a teacher is loaded.
_COMMON = ("teacher", "teacher_weights", "prior_dir", "prompt_source")


def source_class(teacher: str) -> type[Source] | None:
    """The class that makes the priors of a named teacher; None for a video diffusion model.

    >>> source_class("regions").__name__, source_class("CogVideoX-5b")
    ('Regions', None)
    """
    if teacher == REGIONS:
        return Regions
    try:
        # The config of a transformers model has a `model_type`.
        return OwnMaps if "model_type" in read_json(Path(teacher) / "config.json") else None
    except (OSError, ValueError):
        return None


@dataclass
class PriorArguments(Settings):
    """The teachers, and the folder of their priors."""

    teacher: Any = setting(
        None,
        "Folder of a video model as diffusers saves it, or a Hub id (owner/model@revision). Without a video "
        "model: regions (the regions of words in the data file), self (the student's own attention before "
        "training), or the folder of another student. Several teachers are combined.",
        type=str,
        nargs="+",
    )
    teacher_weights: list[str] | None = setting(
        None,
        "One weight for each of several teachers; or confidence: each prior counts by its confidence. "
        "Default: equal weights.",
    )
    prior_dir: str = setting("runs/priors", "Folder of stored priors.")
    prompt_source: str = setting("both", "Text for the teacher.", choices=["both", "question", "answer"])
    teacher_dtype: str = setting("auto", "auto: bfloat16 on CUDA, float32 on the CPU.", choices=DTYPES)
    teacher_size: str | None = setting(
        None, "HEIGHTxWIDTH of the teacher's clips. Default: the size of its training."
    )
    teacher_frames: int | None = setting(
        None,
        "Maximum number of frames of the teacher's clips. Default: the number of its training.",
        least=1,
        most=1000,
    )
    vae_tiling: bool = setting(False, "Encode clips in tiles: less memory, slightly different latents.")
    offload_text_encoder: bool = setting(False, "Keep the text encoder on the CPU.")
    text_cache: str | None = setting(None, "Folder of text embeddings, which later runs use again.")
    compile_teacher: bool = setting(False, "Compile the transformer's blocks with torch.compile.")
    split_batch: bool = setting(False, "Evaluate the two texts of guidance in turn, not in one batch.")
    measure_roundtrip: bool = setting(False, "Also invert and rebuild the first clip, and report the error.")
    region_grid: str = setting("8x16x16", "Grid for regions: FRAMESxHEIGHTxWIDTH.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # A single teacher is a str, not a list.
        if isinstance(self.teacher, list | tuple):
            self.teacher = list(self.teacher) if len(self.teacher) > 1 else self.teacher[0]
        self._refuse_twins()
        if self.teacher_weights is not None and len(self.teachers) < 2:
            raise ValueError("--teacher_weights needs several teachers: --teacher A B")
        self.weights()

    @property
    def teachers(self) -> list[str]:
        """The names of all teachers."""
        if self.teacher is None:
            return []
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)

    def _refuse_twins(self) -> None:
        if len({*map(os.path.realpath, self.teachers)}) < len(self.teachers):
            raise ValueError(f"--teacher must name different teachers, got {' '.join(self.teachers)}")

    def each(self) -> list[PriorArguments]:
        """One copy for each teacher. Only `teachers` and `store` work with several teachers at once."""
        if isinstance(self.teacher, str):
            return [self]
        return [replace(self, teacher=one, teacher_weights=None) for one in self.teachers]

    @property
    def scaled(self) -> bool:
        """Whether the rows of the priors sum to one. Otherwise they are attention mass."""
        return REGIONS in self.teachers or len(self.teachers) > 1

    def weights(self) -> Weights:
        """Weights of the teachers. None: each prior's confidence is its weight.

        Raises:
            ValueError: a weight is not a number above 0, or their number differs from the teachers'.
        """
        given, count = self.teacher_weights, len(self.teachers)
        if given is None:
            return (1.0,) * count
        if given == ["confidence"]:
            return None
        try:
            weights = tuple(float(one) for one in given)
        except ValueError:
            weights = ()
        if len(weights) != count or not all(0 < one < math.inf for one in weights):
            raise ValueError(
                f"--teacher_weights must be {count} numbers above 0, or confidence, got {' '.join(given)}"
            )
        return weights

    def common_grid(self, device: torch.device | str) -> Grid | None:
        """(F, H, W) of the first teacher: priors of all teachers are resampled to it; see `grid`."""
        return self.each()[0].grid(device)

    def waits(self, where: MakerArguments) -> str:
        """The reason why all priors must be made before training; empty if there is none."""
        if len(self.teachers) > 1 and where.prior_engine == "ray":
            return "several teachers in a Ray cluster would wait for each other's GPUs"
        for one in self.each():
            if one.source is not None and one.source.grid(one._given("cpu")) is None:
                return f"the maps of the student {one.teacher} are read before the training and kept"
        return ""

    def store(self, device: torch.device | str) -> CombinedStore:
        """The store of priors. Priors of several teachers are combined."""
        grid = self.common_grid(device) if len(self.teachers) > 1 else None
        return CombinedStore(Path(self.prior_dir), self.weights(), grid)

    def find(self, *, dry_run: bool = False, student: str | None = None) -> None:
        """Replace each Hub id by its folder, and `self` by the student's folder.

        Args:
            dry_run: download nothing; see `model_folder`.
            student: folder of the student; None if no student is trained.

        Raises:
            ValueError: there is no such model, or `self` is named and there is no student.
        """
        found = []
        for name in self.teachers:
            if name == SELF and student is None:
                raise ValueError("--teacher self is the student of a training; here, name its folder instead")
            folder = student if name == SELF else name
            kept = folder in (student, REGIONS)
            found.append(folder if kept else str(model_folder(name, "--teacher", dry_run=dry_run)))
        if found:
            self.teacher = found if len(found) > 1 else found[0]
            self._refuse_twins()

    @property
    def source(self) -> type[Source] | None:
        """The class that makes the priors; None for a video model."""
        return source_class(self.teacher)

    def reading(self, settings: PriorSettings) -> PriorSettings:
        """The settings that affect the priors of this teacher; the others get their defaults."""
        return settings if self.source is None else self.source.settings(settings)

    def check(self, settings: PriorSettings, device: torch.device | str) -> None:
        """Check that the teachers are supported and that the settings fit them; no weight is read.

        Raises:
            ValueError: see `check_settings`; a size that a teacher does not take; a flag that has no effect
                with any of the teachers.
            OSError: a folder or its files are missing.
        """
        idle = [one._idle(settings, device) for one in self.each()]
        if useless := [name for name in idle[0] if all(name in others for others in idle)]:
            teachers = " ".join(self.teachers)
            raise ValueError(f"--{useless[0]} does nothing with --teacher {teachers}; leave it out")

    def _idle(self, settings: PriorSettings, device: torch.device | str) -> list[str]:
        """Check one teacher; return the given flags that have no effect with it."""
        source = self.source
        if source is None:
            check_settings(settings, self.teacher)
        else:
            source.check(str(self.teacher), self._given(device))
        self.identity(device)
        idle = [] if source is None else source.idle(settings)
        for one in fields(self):
            takes = one.name != "region_grid" if source is None else one.name in source.options
            if not (takes or one.name in _COMMON) and getattr(self, one.name) != one.default:
                idle.append(one.name)
        return idle

    def _given(self, device: torch.device | str) -> dict[str, Any]:
        """The options of a `Source`."""
        return {**self.identity(device), "region_grid": self.region_grid}

    def name(self, device: torch.device | str, settings: PriorSettings) -> Callable[[str, str], str]:
        """`prior_keys` of the teacher and its settings."""
        return prior_keys(self.teacher_id(device), self.reading(settings))

    def grid(self, device: torch.device | str) -> Grid | None:
        """(F, H, W) of the priors of the longest clips; None if the grid depends on the clip.

        Raises:
            ValueError, OSError: as from `plan_teacher`.
        """
        if self.source is not None:
            return self.source.grid(self._given(device))
        identity = self.identity(device)
        return plan_teacher(self.teacher, size=identity["size"], frames=identity["frames"]).grid

    def requests(
        self, samples: Iterable[Sample], skips: SkipLog, **options: Any
    ) -> Iterator[tuple[Sample, PriorRequest]]:
        """Yield each sample with the request of its prior; `options` go to `request_priors`."""
        said = None if self.source is None else self.source.said
        return request_priors(samples, self.prompt_source, skips, said=said, **options)

    def identity(self, device: torch.device | str) -> dict[str, Any]:
        """The options of `load_teacher` that change the result, and with it the teacher's id.

        Raises:
            ValueError: --teacher_size is not a size, or the teacher does not take it.
        """
        size = None
        if self.teacher_size is not None:
            height, by, width = self.teacher_size.lower().partition("x")
            if not (by and height.isdecimal() and width.isdecimal()):
                raise ValueError(
                    f"--teacher_size must be HEIGHTxWIDTH like 480x720, got {self.teacher_size!r}"
                )
            size = (int(height), int(width))
            multiple = 1
            # A folder that does not say its multiple gets an error of its own when it is used.
            with suppress(OSError, ValueError):
                multiple = size_multiple(self.teacher or "")
            if any(n < multiple or n % multiple for n in size):
                raise ValueError(
                    f"--teacher_size must be HEIGHTxWIDTH in multiples of {multiple} pixels for "
                    f"{self.teacher}, got {self.teacher_size!r}"
                )
        named = self.teacher_dtype
        dtype = teacher_dtype(device) if named == "auto" else getattr(torch, named)
        return {"dtype": dtype, "size": size, "frames": self.teacher_frames, "vae_tiling": self.vae_tiling}

    def cost_options(self, device: torch.device | str, *, cached: bool = False) -> dict[str, Any]:
        """Return the options of `teacher_cost`: how the teacher is loaded.

        Args:
            device: the teacher's device.
            cached: whether the text cache holds all texts; then no text encoder is loaded.
        """
        offloaded = self.offload_text_encoder and torch.device(device).type != "cpu"
        encoder = "none" if cached and self.text_cache is not None else "host" if offloaded else "device"
        return {**self.identity(device), "split_batch": self.split_batch, "text_encoder": encoder}

    def teacher_id(self, device: torch.device | str) -> str:
        """The id of the teacher that `load` returns; nothing is loaded."""
        if self.source is not None:
            return self.source.named(self.teacher, self._given(device))
        return teacher_id(self.teacher, **self.identity(device))

    def load(self, device: torch.device | str, *, text_encoder: bool = True) -> Teacher | Source:
        """Load the teacher with these options.

        Without its text encoder, the teacher takes only texts that are in `text_cache`.
        """
        if self.source is not None:
            return self.source.open(self.teacher, self._given(device), device)
        return load_teacher(
            self.teacher,
            device,
            **self.identity(device),
            offload_text_encoder=self.offload_text_encoder,
            compile=self.compile_teacher,
            split_batch=self.split_batch,
            text_encoder=text_encoder,
            texts=self.texts(device),
        )

    def absolute(self) -> PriorArguments:
        """Return a copy with absolute paths, because each Ray actor starts in its own folder."""
        names = ["prior_dir", "text_cache", *(["teacher"] if self.teacher != REGIONS else [])]
        paths = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: os.path.abspath(value) for name, value in paths.items()})

    def texts(self, device: torch.device | str) -> TextCache | None:
        """The cache of text embeddings, or None without `--text_cache`."""
        if self.text_cache is None:
            return None
        dtype = self.identity(device)["dtype"]
        return TextCache(Path(self.text_cache), encoder_id(self.teacher, dtype))
