"""CogVideoX 2B, 5B and 1.5 as a teacher: diffusers' classes, read through an attention processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.embeddings import apply_rotary_emb

from mekernels import VideoTokens, flash_attention

from .base import AttentionReader, TextEncoding, VideoLatents
from .frames import nearest_valid_count, resample_frames, to_pixels
from .identity import teacher_id
from .schedule import Schedule, make_schedule


@dataclass
class CogVideoXTeacher:
    """A frozen CogVideoX text-to-video model, loaded from an ordinary diffusers folder.

    Attributes:
        id: digest of the folder (see `teacher_id`).
        heads: attention heads of each layer.
        layers: transformer blocks.
        device: where it runs.
        dtype: of weights and activations; noise levels and latents are kept in float32.
    """

    pipeline: Any
    id: str
    device: torch.device
    dtype: torch.dtype
    family: str = "cogvideox"

    @classmethod
    def from_pretrained(cls, path: Path, *, device: torch.device, dtype: torch.dtype) -> CogVideoXTeacher:
        pipeline = CogVideoXPipeline.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        pipeline.set_progress_bar_config(disable=True)
        # 5B ships a stochastic DPM scheduler; its config makes the deterministic one, SNR shift included.
        pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
            module.eval()
            module.to(device)
        return cls(pipeline, teacher_id(path), device, dtype)

    @property
    def config(self) -> Any:
        return self.pipeline.transformer.config

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the clips the model was trained on."""
        scale = self.pipeline.vae_scale_factor_spatial
        return self.config.sample_height * scale, self.config.sample_width * scale

    def valid_frames(self, count: int) -> int:
        """The nearest number of video frames the model takes: 4m+1, and 8m+5 with a temporal patch of two."""
        compression = self.pipeline.vae_scale_factor_temporal
        patch = self.config.patch_size_t or 1
        return nearest_valid_count(count, compression * patch, 1 + compression * (patch - 1))

    @property
    def max_frames(self) -> int:
        """Video frames of the clips the model was trained on, as a count it takes."""
        return self.valid_frames(self.config.sample_frames)

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        given = len(frames)
        used = min(self.valid_frames(given), self.max_frames)
        pixels = to_pixels(resample_frames(frames, used), self.size).to(self.device, self.dtype)
        posterior = self.pipeline.vae.encode(pixels).latent_dist
        latents = posterior.mode().transpose(1, 2).float() * self.pipeline.vae.config.scaling_factor
        return VideoLatents(latents, self._tokens(latents), given, used, self.size)

    def _tokens(self, latents: torch.Tensor) -> VideoTokens:
        _, frames, _, height, width = latents.shape
        patch, patch_t = self.config.patch_size, self.config.patch_size_t or 1
        if frames % patch_t:
            raise ValueError(
                f"latents have {frames} frames, this model needs a multiple of its temporal patch {patch_t}"
            )
        return VideoTokens(
            frames // patch_t,
            height // patch,
            width // patch,
            text=self.config.max_text_seq_length,
            text_first=True,
        )

    @torch.no_grad()
    def encode_text(self, text: str) -> TextEncoding:
        tokenizer, length = self.pipeline.tokenizer, self.config.max_text_seq_length
        if not tokenizer.is_fast:
            raise ValueError("the teacher's tokenizer gives no character offsets; a fast tokenizer is needed")
        encoded = tokenizer(
            text,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"][0].bool()
        real = mask & ~encoded["special_tokens_mask"][0].bool()
        positions = real.nonzero()[:, 0].tolist()
        if positions != list(range(len(positions))):
            raise ValueError("the teacher's tokenizer must put a prompt's tokens first and pad on the right")
        spans = tuple((int(a), int(b)) for a, b in encoded["offset_mapping"][0][real].tolist())
        full = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        embeds = self.pipeline.text_encoder(ids.to(self.device))[0].to(self.dtype)
        tokens = tuple(tokenizer.convert_ids_to_tokens(ids[0][real].tolist()))
        return TextEncoding(embeds, tokens, spans, text, max(0, full - len(spans)))

    def schedule(self, steps: int) -> Schedule:
        return make_schedule(self.pipeline.scheduler, steps)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: int) -> torch.Tensor:
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
            timestep=torch.full((batch,), timestep, device=self.device, dtype=torch.long),
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
        out = self._attend(query, key, value)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        reference = None
        if self.memory:
            half = len(query) // 2
            reference = F.scaled_dot_product_attention(query[half:], key[half:], value[half:])
            query = query[:half]
            key = torch.cat([key[:half], key[half:]], dim=2)
            value = torch.cat([value[:half], value[half:]], dim=2)
        if self.reader is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            out, lse = flash_attention(query, key, value)
            one = slice(self.row, self.row + 1)
            self.reader(query[one], key[one], lse[one], 2 if self.memory else 1)
        return out if reference is None else torch.cat([out, reference])


def _rotate(
    states: torch.Tensor, text: int, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    if rotary is None:
        return states
    turned: Any = apply_rotary_emb(states[:, :, text:], rotary)  # type: ignore[arg-type]
    return torch.cat([states[:, :, :text], turned], dim=2)
