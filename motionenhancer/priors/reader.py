"""Readers of clips: a teacher with settings, or a source of priors without a teacher."""

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

Grid = tuple[int, int, int]


class Source(ABC):
    """Makes priors without a video diffusion model. It has the same role as a `Teacher`.

    Attributes:
        id: changes whenever the priors of the same clip, text and settings change.
        device: device of the source.
        reads: fields of `PriorSettings` that change its priors.
        options: teacher options that it takes.

    In the methods, `teacher` is the value of --teacher. `given` holds the options of `load_teacher` that
    change the result, and "region_grid".
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[frozenset[str]]
    id: str
    device: torch.device

    @staticmethod
    @abstractmethod
    def check(teacher: str, given: dict[str, Any]) -> None:
        """Raise ValueError or OSError if the source cannot be opened; no weight is read."""

    @classmethod
    @abstractmethod
    def named(cls, teacher: str, given: dict[str, Any]) -> str:
        """Return the id of the source without opening it."""

    @classmethod
    @abstractmethod
    def open(cls, teacher: str, given: dict[str, Any], device: torch.device | str) -> Source:
        """Load the source."""

    @staticmethod
    @abstractmethod
    def said(sample: Sample, source: str) -> str:
        """Return the sample data, besides clip and text, that the source reads; see `PriorRequest.said`.

        Raises:
            ValueError: the source cannot read this sample.
        """

    @staticmethod
    @abstractmethod
    def grid(given: dict[str, Any]) -> Grid | None:
        """(F, H, W) of the priors; None if it depends on the clip."""

    @abstractmethod
    def decode(self, request: PriorRequest) -> Video:
        """Decode the frames that the source reads; VideoError if the clip cannot be read."""

    @abstractmethod
    def read(
        self, request: PriorRequest, video: Video, settings: PriorSettings
    ) -> tuple[MotionPrior, list[tuple[str, str]]]:
        """Make a prior; also return what was left out, as (reason, detail).

        Raises:
            PriorError: the clip and text can give no prior.
        """

    @classmethod
    def settings(cls, given: PriorSettings) -> PriorSettings:
        """The settings with unused ones reset, so that equal priors get the same key."""
        kept = {name: getattr(given, name) for name in cls.reads}
        return PriorSettings(**{"head_selection": "off", "token_selection": "off", **kept})

    @classmethod
    def idle(cls, given: PriorSettings) -> list[str]:
        """Given flags of settings that have no effect."""
        others = [one for one in fields(given) if one.name not in cls.reads]
        return [flag_of(one) for one in others if getattr(given, one.name) != one.default]


@dataclass
class Reader:
    """A teacher or source that reads requests one after the other. Nothing else may use it meanwhile.

    Attributes:
        roundtrip: also measure the inversion error of the first clip.
    """

    teacher: Teacher | Source
    settings: PriorSettings
    roundtrip: bool = False

    def decode(self, request: PriorRequest) -> Video:
        """Decode the frames that the teacher reads; VideoError if the clip cannot be read."""
        if isinstance(self.teacher, Source):
            return self.teacher.decode(request)
        # At the teacher's own size: a clip of large frames would otherwise fill the memory.
        size = self.teacher.size
        return read_frames(request.video, num_frames=self.teacher.max_frames, min_frames=2, size=size)

    def read(self, request: PriorRequest, video: Video) -> Made:
        """Make a prior; PriorError if the clip and text can give none."""
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
