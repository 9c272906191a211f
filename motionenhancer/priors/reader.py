"""Those who read clips: a teacher with the settings of its priors, or a source that needs no teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch

from ..data import Sample
from ..data.video import Video, read_frames
from ..flags import flag_of
from ..teachers import Teacher, roundtrip_error
from .prior import MotionPrior, extract_prior
from .prior_settings import PriorSettings
from .requests import Made, PriorRequest

__all__ = ["Reader", "Source", "inversion_errors"]

Grid = tuple[int, int, int]


class Source(ABC):
    """Makes priors without a video diffusion model; otherwise it is handled as a `Teacher`.

    Attributes:
        id: changes whenever its priors would, for the same clip, text and settings.
        device: where it runs.
        reads: fields of `PriorSettings` that change its priors.
        options: options of the teacher that it takes.

    A `teacher` below is what --teacher names. `given` are the options of `load_teacher` that change what is
    computed, and "region_grid".
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[frozenset[str]]
    id: str
    device: torch.device

    @staticmethod
    @abstractmethod
    def check(teacher: str, given: dict[str, Any]) -> None:
        """Raise ValueError or OSError where it cannot be opened; no weight is read."""

    @classmethod
    @abstractmethod
    def named(cls, teacher: str, given: dict[str, Any]) -> str:
        """Its id, without opening it."""

    @classmethod
    @abstractmethod
    def open(cls, teacher: str, given: dict[str, Any], device: torch.device | str) -> Source:
        """Get it ready."""

    @staticmethod
    @abstractmethod
    def said(sample: Sample, source: str) -> str:
        """What it reads of a sample beside its clip and text; see `PriorRequest.said`.

        Raises:
            ValueError: it cannot read this sample.
        """

    @staticmethod
    @abstractmethod
    def grid(given: dict[str, Any]) -> Grid | None:
        """(F, H, W) of its priors; None where that depends on the clip."""

    @abstractmethod
    def decode(self, request: PriorRequest) -> Video:
        """The frames that it reads; VideoError where a clip cannot be read."""

    @abstractmethod
    def read(
        self, request: PriorRequest, video: Video, settings: PriorSettings
    ) -> tuple[MotionPrior, list[tuple[str, str]]]:
        """Make a prior; return with it what was left out, as (reason, detail).

        Raises:
            PriorError: the clip and text can give none.
        """

    @classmethod
    def settings(cls, given: PriorSettings) -> PriorSettings:
        """The same settings without those that play no part, so that these never tell equal priors apart."""
        kept = {name: getattr(given, name) for name in cls.reads}
        return PriorSettings(**{"head_selection": "off", "token_selection": "off", **kept})

    @classmethod
    def idle(cls, given: PriorSettings) -> list[str]:
        """Flags of settings that are given and play no part."""
        others = [one for one in fields(given) if one.name not in cls.reads]
        return [flag_of(one) for one in others if getattr(given, one.name) != one.default]


@dataclass
class Reader:
    """A teacher or source that reads requests one after the other; nothing else may use it meanwhile.

    Attributes:
        roundtrip: also measure the inversion error of the first clip that is read.
    """

    teacher: Teacher | Source
    settings: PriorSettings
    roundtrip: bool = False

    def decode(self, request: PriorRequest) -> Video:
        """The frames that the teacher reads; VideoError where a clip cannot be read."""
        if isinstance(self.teacher, Source):
            return self.teacher.decode(request)
        # At the teacher's own size: a clip of large frames would otherwise fill the memory.
        size = self.teacher.size
        return read_frames(request.video, num_frames=self.teacher.max_frames, min_frames=2, size=size)

    def read(self, request: PriorRequest, video: Video) -> Made:
        """Make a prior; PriorError where the clip and text can give none."""
        settings, began, times = request.settings or self.settings, perf_counter(), video.timestamps
        if isinstance(self.teacher, Source):
            found, left_out = self.teacher.read(request, video, settings)
            return Made(found, seconds=perf_counter() - began, left_out=tuple(left_out))
        prior = extract_prior(self.teacher, video.frames, request.text, times=times, **asdict(settings))
        seconds, errors = perf_counter() - began, None
        if self.roundtrip:
            self.roundtrip = False
            errors = inversion_errors(self.teacher, video.frames, request.text, settings.steps)
        return Made(prior, seconds=seconds, roundtrip=errors)


def inversion_errors(teacher: Teacher, frames: np.ndarray, text: str, steps: int) -> dict[str, float]:
    """The relative error of inverting and rebuilding a clip without guidance.

    Returns:
        "whole_schedule", and "short_of_zero_snr": over the lower 60 % of the noise levels, if there are any.
    """
    video, embeds = teacher.encode_video(frames), teacher.encode_text(text).embeds
    whole = teacher.schedule(steps, video.tokens.vision)
    cut = 0.6 * (whole.timesteps[-1] + 1)
    with teacher.showing(video):
        errors = {"whole_schedule": roundtrip_error(teacher, video.latents, whole, embeds)}
        if whole.timesteps[0] < cut:
            below = whole.below(int(cut))
            errors["short_of_zero_snr"] = roundtrip_error(teacher, video.latents, below, embeds)
    return errors
