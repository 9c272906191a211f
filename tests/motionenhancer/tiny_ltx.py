"""Tiny LTX pipelines of diffusers' own classes, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from tiny_hunyuan import byte_tokenizer, sharpen
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5EncoderModel

from motionenhancer.toy.language import corpus
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


def save_ltx2(path: Path, *, newer: bool = False) -> Path:
    """Write an LTX-2 pipeline of three heads and two blocks; `newer` has what LTX-2.3 added."""
    specials = ["<pad>", "<eos>", "<bos>"]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "padding_side": "left"}
    tokenizer = byte_tokenizer(specials, list(corpus())[:200], start="<bos>", **names)
    more: dict[str, Any] = {}
    connecting: dict[str, Any] = {"rope_type": "split" if newer else "interleaved"}
    if newer:
        more = {
            "gated_attn": True,
            "audio_gated_attn": True,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
            "rope_type": "split",
        }
        connecting |= {"per_modality_projections": True, "video_hidden_dim": 48, "audio_hidden_dim": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatiotemporal",),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=2,
        )
        vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
        text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
        encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={
                    **text,
                    "vocab_size": len(tokenizer),
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "pad_token_id": 0,
                },
                vision_config={**text, "image_size": 28, "patch_size": 14},
                mm_tokens_per_image=4,
                image_token_index=3,
            )
        )
        connectors: Any = LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=3 if newer else 2,
            video_connector_attention_head_dim=16,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=128,
            audio_connector_num_attention_heads=3 if newer else 4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            **connecting,
        )
        model: Any = LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=3,
            attention_head_dim=16,
            cross_attention_dim=48,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=3,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=24,
            num_layers=2,
            caption_channels=32,
            vae_scale_factors=(2, 4, 4),
            **more,
        )
        sharpen(model)
    pipeline: Any = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vae.eval(),
        audio_vae=None,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        connectors=connectors.eval(),
        transformer=model.eval(),
        vocoder=None,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path
