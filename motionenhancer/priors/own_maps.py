"""Priors from a video VLM's own attention: of the student before training, or of another student."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from mekernels import VideoTokens, select_tokens, token_motion_scores

from ..data import Sample
from ..data.sample import whole_words
from ..data.video import Video, read_frames
from ..students import StudentFamily, load_student
from ..students.load import check_config
from ..students.reading import TextRange, read_maps
from ..students.words import find_words
from ..teachers import teacher_id
from .confidence import prior_confidence
from .prior import MotionPrior, PriorError
from .prior_settings import PriorSettings
from .reader import Source
from .requests import PriorRequest

FRAMES = 16
"""Number of frames of a clip for a family that takes frames at a rate."""


class OwnMaps(Source):
    """Makes priors from a student's text-to-vision attention, averaged over its layers and heads.

    The student reads the sample's conversation with the answers, as in training. A word's row is the mean
    over its tokens. Words are kept by their motion scores, like the words of a teacher.

    Args:
        model, processor, family: from `load_student`.
        id: see `teacher_id`.
        frames: number of evenly spaced frames of each clip.
        size: (height, width) in pixels of the resized frames; None: the processor chooses the size.
    """

    reads = frozenset({"token_ratio", "token_selection"})
    options = frozenset({"teacher_dtype", "teacher_size", "teacher_frames"})

    def __init__(
        self,
        model: Any,
        processor: Any,
        family: StudentFamily,
        id: str,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.processor, self.family, self.id = model, processor, family, id
        self.device = next(model.parameters()).device
        self.frames, self.size = frames or family.num_frames or FRAMES, size

    @staticmethod
    def check(teacher: str, given: dict[str, Any]) -> None:
        check_config(Path(teacher))

    @staticmethod
    def grid(given: dict[str, Any]) -> None:
        return None

    @classmethod
    def named(cls, teacher: str, given: dict[str, Any]) -> str:
        return teacher_id(teacher, **{name: value for name, value in given.items() if name != "region_grid"})

    @classmethod
    def open(cls, teacher: str, given: dict[str, Any], device: torch.device | str) -> OwnMaps:
        model, processor, family = load_student(teacher, given["dtype"], device)
        return cls(model, processor, family, cls.named(teacher, given), given["frames"], given["size"])

    @staticmethod
    def said(sample: Sample, source: str) -> str:
        if sample.images:
            raise ValueError("a student's own maps need samples without images")
        return json.dumps({"messages": sample.messages, "source": source}, sort_keys=True)

    def decode(self, request: PriorRequest) -> Video:
        return read_frames(request.video, num_frames=self.frames, size=self.size, min_frames=2)

    def read(
        self, request: PriorRequest, video: Video, settings: PriorSettings
    ) -> tuple[MotionPrior, list[tuple[str, str]]]:
        said, text, began = json.loads(request.said), request.text, time.perf_counter()
        sample, source = Sample("", said["messages"], (request.video,)), said["source"]
        try:
            maps, _, _ = read_maps(self.model, self.family, self.processor, sample, video, source)
        except ValueError as error:
            raise PriorError(f"the student cannot read it: {error}") from error
        given = whole_words(text)
        rows = maps.of_words(find_words(sample, TextRange(text, given), maps.layout, source))
        if not rows:
            raise PriorError(f"text {text[:60]!r} holds no word after the video")
        spans = [given[word] for word in sorted(rows)]
        attention = torch.stack([rows[word] for word in sorted(rows)])
        if not torch.isfinite(attention).all():
            raise PriorError("the student's attention holds NaN or infinity")
        scores = token_motion_scores(attention, VideoTokens(*maps.grid))
        kept = select_tokens(scores, settings.token_ratio).tolist()
        words = [text[slice(*span)] for span in spans]
        chosen = attention[kept].half()
        prior = MotionPrior(
            attention=chosen,
            tokens=[words[i] for i in kept],
            spans=[spans[i] for i in kept],
            prompt=text,
            grid=maps.grid,
            heads=[],
            head_scores={},
            all_tokens=words,
            all_spans=spans,
            token_scores=scores.tolist(),
            kept=kept,
            confidence=prior_confidence(chosen, maps.grid),
            teacher=self.id,
            settings=settings,
            frames_given=len(video.frames),
            frames_used=len(video.frames),
            evaluations=1,
            seconds={"read": round(time.perf_counter() - began, 4)},
            times=maps.times,
        )
        return prior, []
