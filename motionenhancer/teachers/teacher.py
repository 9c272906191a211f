"""A frozen video diffusion transformer whose attention can be read. Each model family is a subclass."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from mekernels import VideoTokens

from .attention import ReadingProcessor
from .config import Parts, boundary_of, flow_shift
from .folder import blocks, tokenize
from .frames import resample_frames, to_pixels
from .plan import TEXT_MODELS, TeacherPlan
from .protocol import AttentionReader, TextEncoding, VideoLatents
from .schedule import Schedule, check_experts, flow_level, flow_schedule
from .text_cache import TextCache


class Teacher(ABC):
    """A frozen video diffusion transformer, loaded from an ordinary diffusers folder by `load_teacher`.

    Args:
        pipeline: diffusers' pipeline, on its device.
        parts: configurations of the pipeline, from `config.read_folder`.
        plan: sizes of the model and its clips.
        id: see `teacher_id`; changes whenever weights, settings or arithmetic change.
        device, dtype, split_batch, texts: as for `load_teacher`. Noise levels and latents are float32.

    Attributes:
        heads, layers, size, max_frames: those of the plan. Longer clips than `max_frames` are thinned.
        guidance: guidance input of the evaluations, if the model has such an input; 1: no guidance.
        picture: latents of the first frame of the current clip; see `showing`.
        boundary: timestep below which a second expert predicts, see `is_low_noise`; None if one transformer
            is used for all noise levels.
    """

    pipeline_class: ClassVar[Any]
    processor_class: ClassVar[type[ReadingProcessor]]
    #: Names of the transformer's lists of blocks, separated by spaces, and of a block's attention modules.
    blocks: ClassVar[str]
    #: Parts of the pipeline that are never loaded.
    unused: ClassVar[frozenset[str]] = frozenset()
    attentions: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        pipeline: Any,
        parts: Parts,
        plan: TeacherPlan,
        id: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        split_batch: bool = False,
        texts: TextCache | None = None,
    ) -> None:
        self.pipeline, self.plan, self.id = pipeline, plan, id
        self.device, self.dtype, self.split_batch, self.texts = device, dtype, split_batch, texts
        self.heads, self.layers, self.size, self.max_frames = plan.heads, plan.layers, plan.size, plan.frames
        self.boundary = boundary_of(parts)
        self._empty: TextEncoding | None = None
        self.guidance = 1.0
        self.picture: torch.Tensor | None = None

    @staticmethod
    @abstractmethod
    def sizes(parts: Parts) -> TeacherPlan:
        """Sizes of a model and of the clips that it was trained on."""

    @abstractmethod
    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale and order the VAE's latents (1, C, F, H, W) float32 for the transformer."""

    @abstractmethod
    def embed(self, encoded: Any) -> torch.Tensor:
        """(1, length, width) hidden states of the tokenizer's output."""

    def encode(self, text: str) -> TextEncoding:
        """Tokenise a text and embed it with `embed`."""
        encoded, tokens = tokenize(self.pipeline.tokenizer, text, self.plan.text_length)
        return replace(tokens, embeds=self.embed(encoded))

    def schedule(self, steps: int, vision: int | None = None) -> Schedule:
        """The deterministic schedule of `steps` levels, with the forward scheduler's own noise levels.

        Some flows shift the levels by the clip's number of tokens, `vision`; None: that of the longest clip.
        """
        return self._served(flow_schedule(steps, flow_shift(self.pipeline.scheduler.config)))

    def level(self, timestep: int) -> Schedule:
        """A schedule with the single noise level `timestep`."""
        return self._served(flow_level(timestep))

    def _served(self, schedule: Schedule) -> Schedule:
        check_experts(schedule.timesteps, self.boundary, self.pipeline.transformer is not None)
        return schedule

    @abstractmethod
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        """One transformer evaluation of a batch of latents and (b, length, width) texts; float32 out."""

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        """uint8 frames (n, h, w, 3) → latents; first converts n and the size to values that the family takes.

        Raises:
            TypeError, ValueError: frames have another shape or dtype, or there are fewer than two; the VAE
                cannot encode clips of this size in tiles.
        """
        used = min(self.plan.valid_frames(len(frames)), self.max_frames)
        pixels = to_pixels(resample_frames(frames, used), self.size).to(self.device, self.dtype)
        latents = self.pipeline.vae.encode(pixels).latent_dist.mode().float()
        wanted = tuple(pixels // self.plan.scale for pixels in self.size)
        if tuple(latents.shape[-2:]) != wanted:
            # The tiles do not match the clip.
            raise ValueError(
                f"the VAE turned {self.size[0]}x{self.size[1]} pixels into {tuple(latents.shape[-2:])} "
                f"latents, not {wanted}: clips of this size cannot be encoded in tiles"
            )
        grid = [n // patch for n, patch in zip(latents.shape[2:], self.plan.patch, strict=True)]
        text = self.plan.text_length if self.plan.joint else 0
        tokens = VideoTokens(grid[0], grid[1], grid[2], text=text, text_first=self.plan.text_first)
        stride = self.plan.compression * self.plan.patch[0]
        return VideoLatents(self.scaled(latents), tokens, len(frames), used, stride=stride)

    @torch.no_grad()
    def encode_text(self, text: str) -> TextEncoding:
        """The hidden states and tokens of a text.

        Raises:
            ValueError: the text is not in the cache, and there is no text encoder.
        """
        if not text and self._empty is not None:
            return self._empty
        found = None if self.texts is None else self.texts.read(text)
        if found is None:
            if self.pipeline.text_encoder is None:
                kept = "there is no text cache" if self.texts is None else f"not in {self.texts.folder}"
                raise ValueError(f"text {text[:60]!r}: {kept}, and no text encoder is loaded")
            found = self.encode(text)
            found = replace(found, embeds=found.embeds.to(self.device, self.dtype))
            if self.texts is not None:
                self.texts.write(found)
        found = replace(found, embeds=found.embeds.to(self.device, self.dtype))
        if not text:
            self._empty = found
        return found

    def drop_encoder(self, texts: Iterable[str] = ()) -> None:
        """Put texts into the cache, then free the text encoder."""
        for text in texts:
            self.encode_text(text)
        for name in TEXT_MODELS:
            if name in self.pipeline.components:
                setattr(self.pipeline, name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def showing(self, video: VideoLatents) -> Iterator[None]:
        """While open, evaluations belong to this clip: an image-to-video model gets its first frame."""
        before = self.picture
        self.picture = video.picture
        try:
            yield
        finally:
            self.picture = before

    @contextmanager
    def reading(self, reader: AttentionReader | None, *, memory: bool, row: int) -> Iterator[None]:
        """While open, evaluations pass the attention of batch row `row` to `reader`.

        With `memory`, the second half of the batch is the reference stream: row i of the first half attends
        to its own keys and to the keys of row i of the second half, concatenated.
        """
        layers = blocks(self.pipeline, self.blocks)
        modules = [getattr(block, name) for block in layers for name in self.attentions]
        before = [module.processor for module in modules]
        try:
            for module in modules:
                module.set_processor(self.processor_class(reader, memory=memory, row=row))
            yield
        finally:
            for module, processor in zip(modules, before, strict=True):
                module.set_processor(processor)
