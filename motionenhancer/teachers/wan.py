"""Wan 2.1 and 2.2 text-to-video as a teacher: flow matching, vision self-attention, cross-attention to text.

Vision tokens are the queries of the cross-attention, so a word's row is taken the other way round: the
softmax, over all vision positions, of that word's scores. Heads of the two attentions are unrelated: head
selection scores the self-attention's, and a word's row is the mean over all heads of the cross-attention.

Wan 2.2 A14B has two experts of one shape: one for noise levels from a boundary up, one for those below. Each
level is evaluated, and its attention read, in its own expert. A head is pooled by its index over both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from mekernels import VideoTokens

from .attention import attend
from .folder import LoadOptions, check_latents, experts, load_pipeline, tokenize, valid_size
from .frames import nearest_valid_count, resample_frames, to_pixels
from .known import Parts, boundary_of, flow_shift
from .protocol import AttentionReader, TextEncoding, VideoLatents
from .schedule import FlowSchedule, check_experts, flow_level, flow_schedule, is_low_noise

TEXT_LENGTH = 512


def trained_clips(expand_timesteps: bool | None) -> tuple[tuple[int, int], int]:
    """Size and frames of the clips that a model was trained on: a folder does not say.

    Source: the models' cards; TI2V-5B is the one with a time step for each token.
    """
    return ((704, 1280), 121) if expand_timesteps else ((480, 832), 81)


@dataclass
class WanTeacher:
    """A frozen Wan 2.1 or 2.2 text-to-video model, loaded from an ordinary diffusers folder.

    Attributes: as `CogVideoXTeacher`.
    """

    pipeline: Any
    id: str
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, int]
    max_frames: int
    split_batch: bool = False
    boundary: float | None = None
    family: str = "wan"
    _empty: TextEncoding | None = None

    @classmethod
    def from_pretrained(cls, path: Path, options: LoadOptions, parts: Parts) -> WanTeacher:
        unused = {"transformer_2"} - set(parts)
        pipeline = load_pipeline(WanPipeline, path, options, blocks="blocks", unused=unused)
        size, frames = trained_clips(pipeline.config.expand_timesteps)
        patch = experts(pipeline)[0].config.patch_size
        chosen = valid_size(options.size or size, pipeline.vae_scale_factor_spatial * patch[1])
        teacher = cls(
            pipeline,
            options.id(path),
            options.device,
            options.dtype,
            chosen,
            0,
            options.split_batch,
            boundary_of(parts),
        )
        return replace(teacher, max_frames=teacher.valid_frames(options.frames or frames))

    @property
    def config(self) -> Any:
        """Of a transformer; two experts have one shape."""
        return experts(self.pipeline)[0].config

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def layers(self) -> int:
        return self.config.num_layers

    def _tokens(self, latents: torch.Tensor) -> VideoTokens:
        grid = [n // p for n, p in zip(latents.shape[2:], self.config.patch_size, strict=True)]
        return VideoTokens(*grid)

    def valid_frames(self, count: int) -> int:
        """The nearest number of video frames the model takes: 4m+1."""
        return nearest_valid_count(count, self.pipeline.vae_scale_factor_temporal, 1)

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        given = len(frames)
        used = min(self.valid_frames(given), self.max_frames)
        vae = self.pipeline.vae
        pixels = to_pixels(resample_frames(frames, used), self.size).to(self.device, self.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        check_latents(latents.shape[-2:], self.size, self.pipeline.vae_scale_factor_spatial)
        mean, deviation = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = (latents - mean) / deviation
        stride = self.pipeline.vae_scale_factor_temporal * self.config.patch_size[0]
        return VideoLatents(latents, self._tokens(latents), given, used, self.size, stride)

    @torch.no_grad()
    def encode_text(self, text: str) -> TextEncoding:
        if not text and self._empty is not None:
            return self._empty
        pipeline = self.pipeline
        encoded, encoding = tokenize(pipeline.tokenizer, text, TEXT_LENGTH)
        where, mask = pipeline.text_encoder.device, encoded["attention_mask"]
        states = pipeline.text_encoder(encoded["input_ids"].to(where), mask.to(where)).last_hidden_state
        # Padding is masked in the encoder and zero in the transformer, where it is still attended to.
        embeds = states * mask.to(where).unsqueeze(-1)
        encoding = replace(encoding, embeds=embeds.to(self.device, self.dtype))
        if not text:
            self._empty = encoding
        return encoding

    def schedule(self, steps: int) -> FlowSchedule:
        return self._served(flow_schedule(steps, flow_shift(self.pipeline.scheduler.config)))

    def level(self, timestep: int) -> FlowSchedule:
        return self._served(flow_level(timestep))

    def _served(self, schedule: FlowSchedule) -> FlowSchedule:
        check_experts(schedule.timesteps, self.boundary, self.pipeline.transformer is not None)
        return schedule

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        shape: tuple[int, ...] = (len(latents),)
        if self.pipeline.config.expand_timesteps:
            shape = (len(latents), self._tokens(latents).vision)
        low = is_low_noise(timestep, self.boundary)
        expert = self.pipeline.transformer_2 if low else self.pipeline.transformer
        return expert(
            hidden_states=latents.to(self.device, self.dtype),
            timestep=torch.full(shape, timestep, device=self.device),
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0].float()

    @contextmanager
    def reading(self, reader: AttentionReader | None, *, memory: bool, row: int) -> Iterator[None]:
        blocks = [block for transformer in experts(self.pipeline) for block in transformer.blocks]
        modules = [module for block in blocks for module in (block.attn1, block.attn2)]
        before = [module.processor for module in modules]
        try:
            for module in modules:
                module.set_processor(ReadingProcessor(reader, memory=memory, row=row))
            yield
        finally:
            for module, processor in zip(modules, before, strict=True):
                module.set_processor(processor)


class ReadingProcessor:
    """Wan's self-attention with cross-stream memory and its cross-attention, both handed to a reader."""

    def __init__(self, reader: AttentionReader | None, *, memory: bool, row: int) -> None:
        self.reader, self.memory, self.row = reader, memory, row

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError("Wan attends without a mask; got an attention_mask")
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if encoder_hidden_states is None:
            out = attend(query, key, value, self.reader, memory=self.memory, row=self.row)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
            if self.reader is not None:
                one = slice(self.row, self.row + 1)
                self.reader.cross_attention(key[one], query[one])
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels; states (batch, tokens, heads, width)."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(states)
