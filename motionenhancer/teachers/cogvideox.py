"""CogVideoX 2B, 5B and 1.5 as a teacher: diffusers' classes, read through an attention processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.embeddings import apply_rotary_emb

from mekernels import VideoTokens

from .attention import attend
from .folder import LoadOptions, check_latents, load_pipeline, tokenize, valid_size
from .frames import nearest_valid_count, resample_frames, to_pixels
from .known import Parts
from .protocol import AttentionReader, TextEncoding, VideoLatents
from .schedule import DiffusionSchedule, make_schedule, one_level

#: 1.5's configuration names the largest grid of its rotary table, not the size of its clips.
_LARGEST_1_5 = (768, 1360)


@dataclass
class CogVideoXTeacher:
    """A frozen CogVideoX text-to-video model, loaded from an ordinary diffusers folder.

    Attributes:
        pipeline: diffusers' own.
        id: digest of the folder and options (see `teacher_id`).
        device: where it runs.
        dtype: of weights and activations; noise levels and latents are kept in float32.
        size: (height, width) in pixels clips are resized to.
        max_frames: most video frames of a clip, as a count the model takes.
        split_batch, boundary: see `Teacher`.
    """

    pipeline: Any
    id: str
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int]
    max_frames: int
    split_batch: bool = False
    boundary: float | None = None
    family: str = "cogvideox"
    _empty: TextEncoding | None = None

    @classmethod
    def from_pretrained(cls, path: Path, options: LoadOptions, parts: Parts) -> CogVideoXTeacher:
        pipeline = load_pipeline(CogVideoXPipeline, path, options, blocks="transformer_blocks")
        # 5B ships a stochastic DPM scheduler; its config makes the deterministic one, SNR shift included.
        pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
        scale, config = pipeline.vae_scale_factor_spatial, pipeline.transformer.config
        trained = (config.sample_height * scale, config.sample_width * scale)
        if config.patch_size_t is not None:
            trained = (min(trained[0], _LARGEST_1_5[0]), min(trained[1], _LARGEST_1_5[1]))
        chosen = valid_size(options.size or trained, scale * config.patch_size)
        teacher = cls(
            pipeline, options.id(path), options.device, options.dtype, chosen, 0, options.split_batch
        )
        return replace(teacher, max_frames=teacher.valid_frames(options.frames or config.sample_frames))

    @property
    def config(self) -> Any:
        return self.pipeline.transformer.config

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def layers(self) -> int:
        return self.config.num_layers

    def valid_frames(self, count: int) -> int:
        """The nearest number of video frames the model takes: 4m+1, and 8m+5 with a temporal patch of two."""
        compression = self.pipeline.vae_scale_factor_temporal
        patch = self.config.patch_size_t or 1
        return nearest_valid_count(count, compression * patch, 1 + compression * (patch - 1))

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        given = len(frames)
        used = min(self.valid_frames(given), self.max_frames)
        pixels = to_pixels(resample_frames(frames, used), self.size).to(self.device, self.dtype)
        posterior = self.pipeline.vae.encode(pixels).latent_dist
        latents = posterior.mode().transpose(1, 2).float() * self.pipeline.vae.config.scaling_factor
        check_latents(latents.shape[-2:], self.size, self.pipeline.vae_scale_factor_spatial)
        stride = self.pipeline.vae_scale_factor_temporal * (self.config.patch_size_t or 1)
        return VideoLatents(latents, self._tokens(latents), given, used, self.size, stride)

    def _tokens(self, latents: torch.Tensor) -> VideoTokens:
        _, frames, _, height, width = latents.shape
        patch, patch_t = self.config.patch_size, self.config.patch_size_t or 1
        text = self.config.max_text_seq_length
        return VideoTokens(frames // patch_t, height // patch, width // patch, text=text, text_first=True)

    @torch.no_grad()
    def encode_text(self, text: str) -> TextEncoding:
        if not text and self._empty is not None:
            return self._empty
        pipeline = self.pipeline
        encoded, encoding = tokenize(pipeline.tokenizer, text, self.config.max_text_seq_length)
        # No mask: CogVideoX attends to its padding, in the text encoder and in the transformer.
        embeds = pipeline.text_encoder(encoded["input_ids"].to(pipeline.text_encoder.device))[0]
        encoding = replace(encoding, embeds=embeds.to(self.device, self.dtype))
        if not text:
            self._empty = encoding
        return encoding

    def schedule(self, steps: int) -> DiffusionSchedule:
        return make_schedule(self.pipeline.scheduler, steps)

    def level(self, timestep: int) -> DiffusionSchedule:
        return one_level(self.pipeline.scheduler, timestep)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        batch, frames, _, height, width = latents.shape
        scale = self.pipeline.vae_scale_factor_spatial
        rotary = None
        if self.config.use_rotary_positional_embeddings:
            rotary = self.pipeline._prepare_rotary_positional_embeddings(
                height * scale, width * scale, frames, self.device
            )
        return self.pipeline.transformer(
            hidden_states=latents.to(self.device, self.dtype),
            encoder_hidden_states=embeds,
            timestep=torch.full((batch,), int(timestep), device=self.device, dtype=torch.long),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0].float()

    @contextmanager
    def reading(self, reader: AttentionReader | None, *, memory: bool, row: int) -> Iterator[None]:
        blocks = self.pipeline.transformer.transformer_blocks
        before = [block.attn1.processor for block in blocks]
        try:
            for block in blocks:
                block.attn1.set_processor(ReadingProcessor(reader, memory=memory, row=row))
            yield
        finally:
            for block, processor in zip(blocks, before, strict=True):
                block.attn1.set_processor(processor)


class ReadingProcessor:
    """CogVideoX's joint attention with cross-stream memory, handing Q, K and logsumexp to a reader."""

    def __init__(self, reader: AttentionReader | None, *, memory: bool, row: int) -> None:
        self.reader, self.memory, self.row = reader, memory, row

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            raise ValueError("CogVideoX attends without a mask; got an attention_mask")
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = _rotate(attn.norm_q(query) if attn.norm_q is not None else query, text, image_rotary_emb)
        key = _rotate(attn.norm_k(key) if attn.norm_k is not None else key, text, image_rotary_emb)
        out = attend(query, key, value, self.reader, memory=self.memory, row=self.row)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]


def _rotate(
    states: torch.Tensor, text: int, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    if rotary is None:
        return states
    turned: Any = apply_rotary_emb(states[:, :, text:], rotary)  # type: ignore[arg-type]
    return torch.cat([states[:, :, :text], turned], dim=2)
