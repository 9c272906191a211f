"""The flags of priors: which teachers read the clips, how they are loaded, and where priors are made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data import Sample, SkipLog
from ..flags import Settings, setting
from ..hub import model_folder
from ..teachers import Teacher, load_teacher, teacher_dtype, teacher_id
from ..teachers.plan import plan_teacher, size_multiple
from ..teachers.text_cache import TextCache, encoder_id
from .combination import CombinedStore, Weights
from .engine import ENGINES, Engine, open_engine
from .kinds import REGIONS, SELF, source_class
from .prior_settings import PriorSettings, check_settings
from .reader import Grid, Source
from .requests import PriorRequest, request_priors
from .storage import prior_keys

DTYPES = ("auto", "float32", "bfloat16", "float16")


#: Flags of how a teacher is loaded, which not every kind of teacher has.
_LOADING = (
    "teacher_dtype",
    "teacher_size",
    "teacher_frames",
    "vae_tiling",
    "offload_text_encoder",
    "text_cache",
    "compile_teacher",
    "split_batch",
    "measure_roundtrip",
    "region_grid",
)


@dataclass
class PriorArguments(Settings):
    """The teachers, and the folder of their priors."""

    teacher: Any = setting(
        None,
        "Diffusers folder of a video model, or a Hub id (owner/model@revision); or without a video model: "
        "regions, those that the data file gives for words; self, the student's own attention before it is "
        "tuned, or the folder of another student. Several are combined.",
        type=str,
        nargs="+",
    )
    teacher_weights: list[str] | None = setting(
        None, "Weights of several teachers, one each, or confidence: of each prior. Default: all alike."
    )
    prior_dir: str = setting("runs/priors", "Folder of stored priors.")
    prompt_source: str = setting("both", "Text for the teacher.", choices=["both", "question", "answer"])
    teacher_dtype: str = setting("auto", "auto: bfloat16 on CUDA, float32 on the CPU.", choices=DTYPES)
    teacher_size: str | None = setting(None, "HEIGHTxWIDTH of its clips. Default: as it was trained.")
    teacher_frames: int | None = setting(
        None, "Maximum number of frames of its clips. Default: as it was trained.", least=1, most=1000
    )
    vae_tiling: bool = setting(False, "Encode clips in tiles: less memory, slightly other latents.")
    offload_text_encoder: bool = setting(False, "Keep the text encoder on the CPU.")
    text_cache: str | None = setting(None, "Folder that keeps text embeddings, for later runs too.")
    compile_teacher: bool = setting(False, "Compile the transformer's blocks with torch.compile.")
    split_batch: bool = setting(False, "Evaluate the two texts of guidance one after the other.")
    measure_roundtrip: bool = setting(False, "Also invert and rebuild the first clip, and report the error.")
    region_grid: str = setting("8x16x16", "FRAMESxHEIGHTxWIDTH of the grid that regions are drawn on.")

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
        """All that are named."""
        if self.teacher is None:
            return []
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)

    def _refuse_twins(self) -> None:
        if len({*map(os.path.realpath, self.teachers)}) < len(self.teachers):
            raise ValueError(f"--teacher must name different teachers, got {' '.join(self.teachers)}")

    def each(self) -> list[PriorArguments]:
        """The same with one teacher each: everything but these and `store` is of one."""
        if isinstance(self.teacher, str):
            return [self]
        return [replace(self, teacher=one, teacher_weights=None) for one in self.teachers]

    @property
    def scaled(self) -> bool:
        """Whether rows of the priors sum to one, and are no attention mass."""
        return REGIONS in self.teachers or len(self.teachers) > 1

    def weights(self) -> Weights:
        """Weights of the teachers; None: each prior's confidence.

        Raises:
            ValueError: they are no weights, or not one a teacher.
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
        """(F, H, W) that priors of several teachers are brought to, that of the first; see `grid`."""
        return self.each()[0].grid(device)

    def waits(self, where: MakerArguments) -> str:
        """Why all priors must be made before the training; empty where they can be made meanwhile."""
        if len(self.teachers) > 1 and where.prior_engine == "ray":
            return "several teachers in a Ray cluster would wait for each other's GPUs"
        for one in self.each():
            if one.source is not None and one.source.grid(one._given("cpu")) is None:
                return f"the maps of the student {one.teacher} are read before the training and kept"
        return ""

    def store(self, device: torch.device | str) -> CombinedStore:
        """The priors that are kept, of several teachers combined."""
        grid = self.common_grid(device) if len(self.teachers) > 1 else None
        return CombinedStore(Path(self.prior_dir), self.weights(), grid)

    def find(self, *, dry_run: bool = False, student: str | None = None) -> None:
        """Replace an id of the Hub by its folder, and `self` by the student.

        Args:
            dry_run: download nothing; see `model_folder`.
            student: folder of the student that is trained, if one is.

        Raises:
            ValueError: there is no such model, or no student.
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
        """What makes the priors, if it is no video model."""
        assert self.teacher is not None
        return source_class(self.teacher)

    def reading(self, settings: PriorSettings) -> PriorSettings:
        """The settings that priors are made with: those that play no part are left out."""
        return settings if self.source is None else self.source.settings(settings)

    def check(self, settings: PriorSettings, device: torch.device | str) -> None:
        """Check that the teachers are understood and have what is asked of them; no weight is read.

        Raises:
            ValueError: see `check_settings`; a size that a teacher does not take; a flag that does nothing
                with any of them.
            OSError: a folder or its files are missing.
        """
        idle = [one._idle(settings, device) for one in self.each()]
        if useless := [name for name in idle[0] if all(name in others for others in idle)]:
            teachers = " ".join(self.teachers)
            raise ValueError(f"--{useless[0]} does nothing with --teacher {teachers}; leave it out")

    def _idle(self, settings: PriorSettings, device: torch.device | str) -> list[str]:
        """Check one teacher; return the flags that are given and do nothing with it."""
        source = self.source
        if source is None:
            check_settings(settings, self.teacher)
        else:
            source.check(str(self.teacher), self._given(device))
        self.identity(device)
        idle = [] if source is None else source.idle(settings)
        for name in _LOADING:
            takes = name != "region_grid" if source is None else name in source.options
            if not takes and getattr(self, name) != getattr(PriorArguments, name):
                idle.append(name)
        return idle

    def _given(self, device: torch.device | str) -> dict[str, Any]:
        """The options of a `Source`."""
        return {**self.identity(device), "region_grid": self.region_grid}

    def name(self, device: torch.device | str, settings: PriorSettings) -> Callable[[str, str], str]:
        """`prior_keys` of the teacher and its settings."""
        return prior_keys(self.teacher_id(device), self.reading(settings))

    def grid(self, device: torch.device | str) -> Grid | None:
        """(F, H, W) of the longest clips' priors; None where it depends on the clip.

        Raises:
            ValueError, OSError: as from `plan_teacher`.
        """
        assert self.teacher is not None
        if self.source is not None:
            return self.source.grid(self._given(device))
        identity = self.identity(device)
        return plan_teacher(self.teacher, size=identity["size"], frames=identity["frames"]).grid

    def requests(
        self, samples: Iterable[Sample], skips: SkipLog, **options: Any
    ) -> Iterator[tuple[Sample, PriorRequest]]:
        """Say which prior each sample needs; `options` are further ones of `request_priors`."""
        said = None if self.source is None else self.source.said
        return request_priors(samples, self.prompt_source, skips, said=said, **options)

    def identity(self, device: torch.device | str) -> dict[str, Any]:
        """The options of `load_teacher` that change what is computed, and so the teacher's id.

        Raises:
            ValueError: --teacher_size is no size, or none that the teacher takes.
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
        """Return what `teacher_cost` needs to know of how the teacher is loaded.

        Args:
            device: that it runs on.
            cached: the text cache holds all texts, so that no text encoder is loaded.
        """
        offloaded = self.offload_text_encoder and torch.device(device).type != "cpu"
        encoder = "none" if cached and self.text_cache is not None else "host" if offloaded else "device"
        return {**self.identity(device), "split_batch": self.split_batch, "text_encoder": encoder}

    def teacher_id(self, device: torch.device | str) -> str:
        """The id of the teacher that `load` returns; nothing is loaded."""
        assert self.teacher is not None
        if self.source is not None:
            return self.source.named(self.teacher, self._given(device))
        return teacher_id(self.teacher, **self.identity(device))

    def load(self, device: torch.device | str, *, text_encoder: bool = True) -> Teacher | Source:
        """The teacher, loaded as these options say.

        Without its text encoder it knows the texts of `text_cache` only.
        """
        assert self.teacher is not None
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
        """Return the same with absolute paths: Ray's actors start in folders of their own."""
        names = ["prior_dir", "text_cache", *(["teacher"] if self.teacher != REGIONS else [])]
        paths = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: os.path.abspath(value) for name, value in paths.items()})

    def texts(self, device: torch.device | str) -> TextCache | None:
        """The cache of text embeddings, or None without `--text_cache`."""
        if self.text_cache is None:
            return None
        assert self.teacher is not None
        dtype = self.identity(device)["dtype"]
        return TextCache(Path(self.text_cache), encoder_id(self.teacher, dtype))


@dataclass
class MakerArguments(Settings):
    """Where priors are made. This does not change a prior."""

    prior_engine: str = setting(
        "local",
        "local: one teacher in each process. ray: teachers on the GPUs of a Ray cluster.",
        choices=ENGINES,
        aliases=["--engine"],
    )
    prior_workers: int = setting(
        2,
        "Number of threads that decode clips ahead of the teacher.",
        aliases=["--decode_workers", "--decode-workers"],
        least=1,
    )
    ray_address: str | None = setting(None, "Address of the cluster. Default: a running one, or a new one.")
    ray_workers: int | None = setting(None, "Number of teachers. Default: one per GPU.", least=1)
    ray_cpus: int | None = setting(None, "CPU cores of each teacher. Default: 1.", least=1)
    ray_wait: float | None = setting(
        None, "Stop the run after N seconds without a teacher, or on one prior. Default: 3600.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ray_address", "ray_workers", "ray_cpus", "ray_wait"):
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
            wait=self.ray_wait,
        )
