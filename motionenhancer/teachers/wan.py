"""Wan 2.1 and 2.2 text-to-video as a teacher: flow matching, vision self-attention, cross-attention to text.

Vision tokens are the queries of the cross-attention. So a word's row is the softmax of the word's scores over
all vision positions. The heads of the two attentions are unrelated: head selection scores the heads of the
self-attention, and a word's row is the mean over all heads of the cross-attention.

Wan 2.2 A14B has two experts of the same shape: one for noise levels at or above a boundary, one for levels
below. Each level is evaluated and read in its expert. Heads are pooled by index over both experts.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline

from .attention import ReadingProcessor
from .config import Parts
from .plan import TeacherPlan
from .schedule import is_low_noise
from .teacher import Teacher

TEXT_LENGTH = 512


class WanProcessor(ReadingProcessor):
    """Wan's self-attention with cross-stream memory, and its cross-attention."""

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
            out = self.attend(query, key, value)
        else:
            out = self.attend_text(query, key, value)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class WanTeacher(Teacher):
    """A frozen Wan 2.1 or 2.2 text-to-video model."""

    pipeline_class = WanPipeline
    processor_class = WanProcessor
    blocks = "blocks"
    attentions = ("attn1", "attn2")

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        # A folder does not say what clips its model was trained on. Source: the models' cards; TI2V-5B is the
        # one with a time step for each token.
        size, frames = ((704, 1280), 121) if parts["pipeline"]["expand_timesteps"] else ((480, 832), 81)
        config, vae = parts.get("transformer") or parts["transformer_2"], parts["vae"]
        return TeacherPlan(
            frames=frames,
            size=size,
            scale=vae["scale_factor_spatial"],
            compression=vae["scale_factor_temporal"],
            patch=tuple(config["patch_size"]),
            text_length=TEXT_LENGTH,
            joint=False,
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
        )

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self.pipeline.vae.config.latents_mean, self.pipeline.vae.config.latents_std)
        )
        return (latents - mean) / deviation

    def embed(self, encoded: Any) -> torch.Tensor:
        encoder = self.pipeline.text_encoder
        ids, mask = (encoded[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        # Padding is masked in the encoder and zero in the transformer, where it is still attended to.
        return encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        shape: tuple[int, ...] = (len(latents),)
        if self.pipeline.config.expand_timesteps:
            height, width = (
                n // patch for n, patch in zip(latents.shape[-2:], self.plan.patch[1:], strict=True)
            )
            shape = (len(latents), latents.shape[2] * height * width)
        low = is_low_noise(timestep, self.boundary)
        expert = self.pipeline.transformer_2 if low else self.pipeline.transformer
        return expert(
            hidden_states=latents.to(self.device, self.dtype),
            timestep=torch.full(shape, timestep, device=self.device),
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0].float()


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels; states (batch, tokens, heads, width)."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(states)
