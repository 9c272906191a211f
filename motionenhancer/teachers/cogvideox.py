"""CogVideoX 2B, 5B and 1.5 as a teacher: diffusers' classes with an attention processor that reads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.embeddings import apply_rotary_emb

from .attention import ReadingProcessor
from .config import Parts
from .plan import TeacherPlan
from .schedule import DiffusionSchedule, make_schedule, one_level
from .teacher import Teacher

#: 1.5's configuration names the largest grid of its rotary table, not the size of its clips.
_LARGEST_1_5 = (768, 1360)


class JointProcessor(ReadingProcessor):
    """CogVideoX's joint attention with cross-stream memory."""

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
        out = self.attend(query, key, value)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]


class CogVideoXTeacher(Teacher):
    """A frozen CogVideoX text-to-video model."""

    pipeline_class: ClassVar[Any] = CogVideoXPipeline
    processor_class = JointProcessor
    blocks = "transformer_blocks"
    attentions = ("attn1",)

    def __init__(self, pipeline: Any, *args: Any, **options: Any) -> None:
        super().__init__(pipeline, *args, **options)
        # 5B ships a stochastic DPM scheduler; its config makes the deterministic one, SNR shift included.
        pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        config, vae = parts["transformer"], parts["vae"]
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        height, width = config["sample_height"] * scale, config["sample_width"] * scale
        if config["patch_size_t"] is not None:
            height, width = min(height, _LARGEST_1_5[0]), min(width, _LARGEST_1_5[1])
        return TeacherPlan(
            frames=config["sample_frames"],
            size=(height, width),
            scale=scale,
            compression=vae["temporal_compression_ratio"],
            patch=(config["patch_size_t"] or 1, config["patch_size"], config["patch_size"]),
            text_length=config["max_text_seq_length"],
            joint=True,
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            # Learnt positions are for clips of one size and length.
            fixed=bool(config["use_learned_positional_embeddings"]),
        )

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2) * self.pipeline.vae.config.scaling_factor

    def embed(self, encoded: Any) -> torch.Tensor:
        # No mask: CogVideoX attends to its padding, in the text encoder and in the transformer.
        encoder = self.pipeline.text_encoder
        return encoder(encoded["input_ids"].to(encoder.device))[0]

    def schedule(self, steps: int, vision: int | None = None) -> DiffusionSchedule:
        return make_schedule(self.pipeline.scheduler, steps)

    def level(self, timestep: int) -> DiffusionSchedule:
        return one_level(self.pipeline.scheduler, timestep)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        batch, frames, _, height, width = latents.shape
        scale, rotary = self.plan.scale, None
        if self.pipeline.transformer.config.use_rotary_positional_embeddings:
            rotary = self.pipeline._prepare_rotary_positional_embeddings(
                height * scale, width * scale, frames, self.device
            )
        return self.pipeline.transformer(
            hidden_states=latents.to(self.device, self.dtype),
            encoder_hidden_states=embeds,
            timestep=torch.full((batch,), int(timestep), device=self.device, dtype=torch.long),
            image_rotary_emb=rotary,
            # Only 1.5 image-to-video has this input; its pipeline gives the same value.
            ofs=None
            if self.pipeline.transformer.config.ofs_embed_dim is None
            else latents.new_full((1,), 2.0),
            return_dict=False,
        )[0].float()


def _rotate(
    states: torch.Tensor, text: int, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    if rotary is None:
        return states
    turned: Any = apply_rotary_emb(states[:, :, text:], rotary)  # type: ignore[arg-type]
    return torch.cat([states[:, :, :text], turned], dim=2)
