"""HunyuanVideo 1.5 text-to-video as a teacher: three streams of text, valid tokens first.

The text tokens of the attention are the letters of the quoted words of a prompt, then the tokens of the
prompt.
There is no picture. Source: diffusers, `HunyuanVideo15Pipeline`, with its template and lengths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

from .config import Parts
from .folder import tokenize
from .hunyuan_video import HunyuanVideoTeacher, stack_texts
from .plan import TeacherPlan
from .protocol import TextEncoding

TEXT_LENGTH, QUOTED_LENGTH, CROP = 1000, 256, 108


class HunyuanVideo15Teacher(HunyuanVideoTeacher):
    """A frozen HunyuanVideo 1.5 text-to-video model."""

    pipeline_class = HunyuanVideo15Pipeline
    blocks = "transformer_blocks"

    @staticmethod
    def sizes(parts: Parts) -> TeacherPlan:
        plan, target = HunyuanVideoTeacher.sizes(parts), parts["transformer"]["target_size"]
        buckets = HunyuanVideo15ImageProcessor(vae_scale_factor=plan.scale)
        height, width = buckets.calculate_default_height_width(9, 16, target)
        return replace(plan, frames=121, size=(int(height), int(width)), text_length=TEXT_LENGTH)

    def encode(self, text: str) -> TextEncoding:
        pipeline = self.pipeline
        mark = "\ue000"
        system = {"role": "system", "content": pipeline.system_message}

        def rendered(prompt: str) -> str:
            user = {"role": "user", "content": prompt}
            return pipeline.tokenizer.apply_chat_template(
                [system, user], add_generation_prompt=True, tokenize=False
            )

        before, _, after = rendered(mark).partition(mark)
        # The pipeline gives an empty prompt as a space.
        prompt = text or " "
        if rendered(prompt) != before + prompt + after:
            raise ValueError("the chat template of the teacher's tokenizer changes the text of the prompt")
        encoded, tokens = tokenize(
            pipeline.tokenizer,
            prompt,
            TEXT_LENGTH,
            template=(before, after),
            crop=CROP,
            add_special_tokens=False,
        )
        states = self.embed(encoded)[:, CROP:]
        mask = encoded["attention_mask"][:, CROP:, None].to(states.device)
        second = pipeline.text_encoder_2
        quoted, kept = pipeline._get_byt5_prompt_embeds(
            pipeline.tokenizer_2, second, prompt, second.device, QUOTED_LENGTH
        )
        embeds = stack_texts((quoted * kept[..., None]).to(states), states * mask)
        first = int(kept.sum())
        if not text:
            tokens = replace(tokens, text="", tokens=(), spans=(), words=(), rows=())
        rows = tuple(first + row for row in tokens.rows or ())
        return replace(tokens, embeds=embeds, rows=rows, attended=first + int(mask.sum()))

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        """`embeds` holds the quoted words, then the prompt; a row of zeros is padding."""
        batch, config = len(latents), self.pipeline.transformer.config
        latents = latents.to(self.device, self.dtype)
        quoted = embeds[:, :QUOTED_LENGTH, : config.text_embed_2_dim]
        text = embeds[:, QUOTED_LENGTH:, : config.text_embed_dim]
        # There is no picture: its latents and mask beside the noisy ones are zero, and so are its tokens.
        picture = torch.zeros_like(torch.cat([latents, latents[:, :1]], dim=1))
        return self.pipeline.transformer(
            hidden_states=torch.cat([latents, picture], dim=1),
            timestep=torch.full((batch,), timestep, device=self.device).to(self.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=text.any(-1).to(self.dtype),
            encoder_hidden_states_2=quoted,
            encoder_attention_mask_2=quoted.any(-1).to(self.dtype),
            image_embeds=embeds.new_zeros(batch, 1, config.image_embed_dim),
            return_dict=False,
        )[0].float()
