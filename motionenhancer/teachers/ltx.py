"""LTX-Video text-to-video as a teacher: a flow whose shift grows with the clip, cross-attention to text.

A word's row is read as in Wan: the softmax of the word's scores over all vision positions. Source: diffusers,
`LTXPipeline`, with its lengths and frame rate.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import LTXPipeline
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from .attention import ReadingProcessor
from .config import Parts
from .plan import TeacherPlan
from .schedule import FlowSchedule, flow_schedule
from .teacher import Teacher

TEXT_LENGTH, FRAME_RATE = 128, 25


class LTXProcessor(ReadingProcessor):
    """LTX-Video's self-attention with cross-stream memory, and its cross-attention, padding masked."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(states))
        if image_rotary_emb is not None:
            query, key = (self.rotate(attn, x, image_rotary_emb) for x in (query, key))
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(states))
        )
        if encoder_hidden_states is None:
            out = self.attend(query, key, value)
        else:
            mask = None if attention_mask is None else attention_mask.unsqueeze(1)
            out = self.attend_text(query, key, value, mask)
        out = self.gate(attn, hidden_states, out.transpose(1, 2))
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def rotate(
        self, attn: Any, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return apply_rotary_emb(states, rotary)

    def gate(self, attn: Any, hidden_states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Change the output of the heads (batch, tokens, heads, width) before the heads are mixed."""
        return out


class LTXTeacher(Teacher):
    """A frozen LTX-Video text-to-video model."""

    pipeline_class: ClassVar[Any] = LTXPipeline
    processor_class = LTXProcessor
    blocks = "transformer_blocks"
    attentions = ("attn1", "attn2")

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        config, vae = parts["transformer"], parts["vae"]
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        # A folder does not say what clips its model was trained on: these are the pipeline's own.
        return TeacherPlan(
            frames=161,
            size=(512, 704),
            scale=vae["spatial_compression_ratio"] or vae["patch_size"] * halvings,
            compression=vae["temporal_compression_ratio"] or vae["patch_size_t"] * halvings,
            patch=(1, 1, 1),
            text_length=TEXT_LENGTH,
            joint=False,
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
        )

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        mean, deviation = (x.float().view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * vae.config.scaling_factor / deviation

    def embed(self, encoded: Any) -> torch.Tensor:
        encoder = self.pipeline.text_encoder
        ids, mask = (encoded[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        # The encoder attends to padding, the transformer does not: there it is a row of zeros.
        return encoder(ids)[0] * mask.unsqueeze(-1)

    def schedule(self, steps: int, vision: int | None = None) -> FlowSchedule:
        config = self.pipeline.scheduler.config
        shift = config.shift
        if config.use_dynamic_shifting:
            lengths = config.base_image_seq_len, config.max_image_seq_len
            tokens = self.plan.vision if vision is None else vision
            shift = math.exp(calculate_shift(tokens, *lengths, config.base_shift, config.max_shift))
        return flow_schedule(steps, shift, config.shift_terminal)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        """A row of zeros in `embeds` is padding."""
        scale, (frames, height, width) = self.plan.scale, latents.shape[2:]
        output = self.pipeline.transformer(
            hidden_states=latents.to(self.device, self.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=torch.full((len(latents),), timestep, device=self.device),
            encoder_attention_mask=embeds.any(-1),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.plan.compression / FRAME_RATE, scale, scale),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (frames, height, width)).float()
