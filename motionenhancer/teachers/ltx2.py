"""LTX-2 text-to-video as a teacher: its video stream without its sound.

A clip has no sound, so the streams are isolated, which is an option of the model: video does not attend to
sound. Before the transformer, a connector moves the text tokens to the front and replaces padding by learnt
registers, to which the model attends. So a word's row is read at its position among the valid tokens. Source:
diffusers, `LTX2Pipeline`, with its lengths and frame rate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import LTX2Pipeline
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

from .config import Parts
from .folder import tokenize
from .ltx import LTXProcessor, LTXTeacher
from .plan import TeacherPlan
from .protocol import TextEncoding

TEXT_LENGTH, FRAME_RATE = 1024, 24.0


class LTX2Processor(LTXProcessor):
    """LTX-2's attention of video tokens, whose heads may be gated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        given = {"attention_mask": attention_mask, "perturbation_mask": perturbation_mask}
        for name, value in {**given, "key_rotary_emb": key_rotary_emb}.items():
            if value is not None:
                raise ValueError(f"LTX-2's video tokens attend without {name}; got one")
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, query_rotary_emb)

    def rotate(
        self, attn: Any, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        if attn.rope_type == "split":
            return apply_split_rotary_emb(states, rotary)
        return super().rotate(attn, states, rotary)

    def gate(self, attn: Any, hidden_states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if attn.to_gate_logits is None:
            return out
        return out * (2 * attn.to_gate_logits(hidden_states).sigmoid()).unsqueeze(-1)


class LTX2Teacher(LTXTeacher):
    """A frozen LTX-2 text-to-video model."""

    pipeline_class = LTX2Pipeline
    processor_class = LTX2Processor
    unused = frozenset({"audio_vae", "vocoder", "processor", "prompt_enhancer", "duration_head"})

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        return replace(LTXTeacher.sizes(parts), frames=121, size=(512, 768), text_length=TEXT_LENGTH)

    def encode(self, text: str) -> TextEncoding:
        pipeline, stripped = self.pipeline, text.strip()
        _, tokens = tokenize(pipeline.tokenizer, stripped, TEXT_LENGTH, padding_side="right")
        states, mask = pipeline._get_gemma_prompt_embeds(
            text, max_sequence_length=TEXT_LENGTH, device=pipeline.text_encoder.device
        )
        embeds = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)[0]
        before = len(text) - len(text.lstrip())
        spans = tuple((a + before, b + before) for a, b in tokens.spans)
        return replace(tokens, embeds=embeds, text=text, spans=spans)

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        batch, (frames, height, width) = len(latents), latents.shape[2:]
        config = self.pipeline.transformer.config
        given = latents.to(self.device, self.dtype).flatten(2).transpose(1, 2)
        time = torch.full((batch,), timestep, device=self.device)
        # Nothing of the sound reaches the video: one silent frame and an empty text stand for it.
        text = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
        output, _ = self.pipeline.transformer(
            hidden_states=given,
            audio_hidden_states=given.new_zeros(batch, 1, config.audio_in_channels),
            encoder_hidden_states=embeds,
            audio_encoder_hidden_states=given.new_zeros(batch, 1, text),
            timestep=time,
            sigma=time,
            num_frames=frames,
            height=height,
            width=width,
            fps=FRAME_RATE,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )
        return output.transpose(1, 2).unflatten(2, (frames, height, width)).float()
