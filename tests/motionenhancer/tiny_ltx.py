"""Tiny LTX pipelines of diffusers' own classes, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from tiny_hunyuan import sharpen
from transformers import T5Config, T5EncoderModel

from motionenhancer.toy.tokenizers import t5_tokenizer

#: As the published model's, but for clips of a few tokens.
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 32,
    "max_image_seq_len": 128,
    "shift_terminal": 0.1,
}


def save_ltx(path: Path, **scheduler: Any) -> Path:
    """Write an LTX-Video pipeline of three heads and two blocks."""
    tokenizer = t5_tokenizer(max_length=128)
    four, five = (8,) * 4, (1,) * 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=four,
            decoder_block_out_channels=four,
            layers_per_block=five,
            decoder_layers_per_block=five,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        )
        vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        )
        model: Any = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=3,
            attention_head_dim=16,
            cross_attention_dim=48,
            num_layers=2,
            caption_channels=32,
        )
        sharpen(model)
    pipeline: Any = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or DYNAMIC)),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=model.eval(),
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path
