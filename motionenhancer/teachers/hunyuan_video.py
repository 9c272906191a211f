"""HunyuanVideo text-to-video as a teacher: joint attention with the text last; its padding is cut off.

Source: diffusers, `HunyuanVideoPipeline`, with its prompt template and lengths. Guidance-distilled models
take guidance as an input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from .attention import ReadingProcessor
from .config import Parts
from .folder import blocks, tokenize
from .plan import TeacherPlan
from .protocol import TextEncoding
from .teacher import Teacher

TEXT_LENGTH, POOLED_LENGTH = 256, 77


class TextLastProcessor(ReadingProcessor):
    """Joint attention of vision, then text, whose padding comes last and is masked."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vision, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        # Of vision and text, or of text alone.
        valid = attention_mask.flatten(1).long().sum(1) + vision + text - attention_mask.shape[-1]

        own = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        added = own  # Single-stream blocks have one set of projections.
        if attn.add_q_proj is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = (*projections, attn.norm_added_q, attn.norm_added_k)
        query, key, value = _project(hidden_states, attn.heads, *own)
        text_query, text_key, text_value = _project(encoder_hidden_states, attn.heads, *added)
        rotate: Any = apply_rotary_emb
        out = self.attend_valid(
            torch.cat([rotate(query, image_rotary_emb), text_query], dim=2),
            torch.cat([rotate(key, image_rotary_emb), text_key], dim=2),
            torch.cat([value, text_value], dim=2),
            valid,
        )
        out = out.transpose(1, 2).flatten(2)
        hidden_states, encoder_hidden_states = out[:, :vision], out[:, vision:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


def _project(
    states: torch.Tensor, heads: int, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (to(states).unflatten(2, (heads, -1)).transpose(1, 2) for to in (to_q, to_k, to_v))
    return norm_q(query), norm_k(key), value


def stack_texts(*texts: torch.Tensor) -> torch.Tensor:
    """Concatenate texts (1, length, width) of several encoders; zeros fill the missing width."""
    width = max(text.shape[-1] for text in texts)
    return torch.cat([F.pad(text, (0, width - text.shape[-1])) for text in texts], dim=1)


class HunyuanVideoTeacher(Teacher):
    """A frozen HunyuanVideo text-to-video model."""

    pipeline_class: ClassVar[Any] = HunyuanVideoPipeline
    processor_class = TextLastProcessor
    blocks = "transformer_blocks single_transformer_blocks"
    attentions = ("attn",)

    def __init__(self, pipeline: Any, *args: Any, **options: Any) -> None:
        super().__init__(pipeline, *args, **options)
        for block in blocks(pipeline, self.blocks):
            block.attn.set_processor(self.processor_class(None, memory=False, row=0))

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        config, vae = parts["transformer"], parts["vae"]
        # A folder does not say what clips its model was trained on. Source: the model's card.
        return TeacherPlan(
            frames=129,
            size=(720, 1280),
            scale=vae["spatial_compression_ratio"],
            compression=vae["temporal_compression_ratio"],
            patch=(config["patch_size_t"], config["patch_size"], config["patch_size"]),
            text_length=TEXT_LENGTH,
            joint=True,
            heads=config["num_attention_heads"],
            layers=config["num_layers"] + config.get("num_single_layers", 0),
            width=config["num_attention_heads"] * config["attention_head_dim"],
            text_first=False,
            embedded_guidance=config.get("guidance_embeds", False),
        )

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def encode(self, text: str) -> TextEncoding:
        pipeline, made = self.pipeline, dict[str, Any](DEFAULT_PROMPT_TEMPLATE)
        crop, (before, after) = made["crop_start"], made["template"].split("{}")
        encoded, tokens = tokenize(pipeline.tokenizer, text, TEXT_LENGTH, template=(before, after), crop=crop)
        states = self.embed(encoded)[:, crop:]
        mask = encoded["attention_mask"][:, crop:, None].to(states.device)
        ids = pipeline.tokenizer_2(
            text, padding="max_length", max_length=POOLED_LENGTH, truncation=True, return_tensors="pt"
        )["input_ids"]
        pooled = pipeline.text_encoder_2(ids.to(pipeline.text_encoder_2.device)).pooler_output
        embeds = stack_texts(pooled[:, None].to(states), states * mask)
        return replace(tokens, embeds=embeds, attended=int(mask.sum()))

    def embed(self, encoded: Any) -> torch.Tensor:
        encoder = self.pipeline.text_encoder
        ids, mask = (encoded[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        return encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        """`embeds` holds the pooled text in its first row; a row of zeros is padding."""
        batch, config = len(latents), self.pipeline.transformer.config
        text = embeds[:, 1:, : config.text_embed_dim]
        guidance = torch.full((batch,), self.guidance, dtype=self.dtype, device=self.device) * 1000.0
        return self.pipeline.transformer(
            hidden_states=latents.to(self.device, self.dtype),
            timestep=torch.full((batch,), timestep, device=self.device),
            encoder_hidden_states=text,
            encoder_attention_mask=text.any(-1).to(self.dtype),
            pooled_projections=embeds[:, 0, : config.pooled_projection_dim],
            guidance=guidance if config.guidance_embeds else None,
            return_dict=False,
        )[0].float()
