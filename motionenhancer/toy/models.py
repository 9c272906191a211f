"""Tiny teacher and student: the real diffusers and transformers classes with small numbers in their configs.

Both are written as ordinary folders that ``from_pretrained`` reads, with random weights drawn from a seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from motionenhancer.toy.render import render
from motionenhancer.toy.scene import sample_scene
from motionenhancer.toy.tokenizers import qwen_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from diffusers import CogVideoXPipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

__all__ = [
    "STUDENT",
    "make_student",
    "make_teacher",
    "save_blank_student",
    "save_student",
    "save_teacher",
    "widen",
]

STUDENT: dict[str, Any] = {"vision_hidden_size": 48, "temporal_patch_size": 4, "tokens_per_second": 4}
"""Sizes of the students that learn: a token holds four frames of 8 x 8 pixels."""


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def _unit_scale(vae: Any, frames: int, height: int, width: int) -> float:
    """Return one divided by the deviation of the latents of two toy clips, to four digits."""
    clips = [
        render(sample_scene(np.random.default_rng(i)), frames=frames, height=height, width=width)
        for i in range(2)
    ]
    video = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 4, 1, 2, 3)
    latents = vae.encode(video.float() / 127.5 - 1.0).latent_dist.mode()
    return float(f"{1.0 / max(latents.std().item(), 1e-6):.4g}")


def make_teacher(
    *,
    seed: int = 0,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    positions: Literal["rotary", "sinusoidal", "learned"] = "rotary",
    patch_size_t: int | None = None,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    text_length: int = 48,
    vae_channels: tuple[int, ...] = (8, 16, 16),
    temporal_compression: int = 4,
    latent_channels: int = 8,
    text_width: int = 32,
    snr_shift_scale: float | None = None,
    scaling_factor: float | None = None,
) -> CogVideoXPipeline:
    """Build a CogVideoX pipeline of tiny size with random, untrained weights.

    With the defaults a clip of 17 x 64 x 64 becomes 5 x 16 x 16 latents and a grid of 5 x 8 x 8 vision tokens
    after 48 text tokens.

    Args:
        seed: seed of all weights; the caller's random state is left as it was.
        layers, heads, head_dim: of the transformer; with rotary positions head_dim is a multiple of 16.
        positions: ``"rotary"`` as in 5B, ``"sinusoidal"`` as in 2B, ``"learned"`` as in 5B image-to-video (a
            stored table next to rotary positions, for exactly the sample size).
        patch_size_t: None for CogVideoX 1.0; 2 for 1.5, which needs an even number of latent frames.
        frames, height, width: the clip that the sample size is made for, in frames and pixels.
        text_length: text tokens, padding included.
        vae_channels: one entry per VAE block; n entries shrink the picture by 2 ** (n - 1).
        temporal_compression: factor by which the VAE shrinks time: 1, 2 or 4, as in the released models.
        latent_channels: channels of the latents.
        text_width: width of the T5 encoder.
        snr_shift_scale: of the scheduler; None takes the value of the released models, 3.0 for sinusoidal
            (2B), else 1.0.
        scaling_factor: of the VAE; None measures it on two toy clips, so that latents have unit deviation.

    Raises:
        ValueError: a size that the classes cannot take, by name.

    >>> pipe = make_teacher(layers=1)
    >>> type(pipe.transformer).__name__
    'CogVideoXTransformer3DModel'
    """
    spatial = 2 ** (len(vae_channels) - 1)
    if positions not in ("rotary", "sinusoidal", "learned"):
        raise ValueError(f"positions must be 'rotary', 'sinusoidal' or 'learned', got {positions!r}")
    if positions != "sinusoidal" and head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16 with rotary positions, got {head_dim}")
    if len(vae_channels) < 3:
        raise ValueError(f"vae_channels must have at least 3 entries to shrink time by 4, got {vae_channels}")
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % (2 * spatial):
            raise ValueError(f"{name} must be a positive multiple of {2 * spatial}, got {value}")
    if temporal_compression not in (1, 2, 4):
        raise ValueError(f"temporal_compression must be 1, 2 or 4, got {temporal_compression}")
    if frames < 1 or (frames - 1) % temporal_compression:
        raise ValueError(f"frames must be {temporal_compression} m + 1, got {frames}")

    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(max_length=text_length)
    rotary = positions != "sinusoidal"
    if snr_shift_scale is None:
        snr_shift_scale = 1.0 if rotary else 3.0
    with _seeded(seed):
        vae: Any = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * len(vae_channels),
            up_block_types=("CogVideoXUpBlock3D",) * len(vae_channels),
            block_out_channels=vae_channels,
            latent_channels=latent_channels,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=temporal_compression,
            sample_height=height,
            sample_width=width,
            scaling_factor=1.0 if scaling_factor is None else scaling_factor,
        )
        transformer: Any = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=latent_channels,
            out_channels=latent_channels,
            time_embed_dim=64,
            text_embed_dim=text_width,
            num_layers=layers,
            sample_width=width // spatial,
            sample_height=height // spatial,
            sample_frames=frames,
            patch_size=2,
            patch_size_t=patch_size_t,
            temporal_compression_ratio=temporal_compression,
            max_text_seq_length=text_length,
            spatial_interpolation_scale=1.0,
            use_rotary_positional_embeddings=rotary,
            use_learned_positional_embeddings=positions == "learned",
            patch_bias=patch_size_t is None,
        )
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=text_width,
                d_kv=16,
                d_ff=4 * text_width,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    if scaling_factor is None:
        vae.register_to_config(scaling_factor=_unit_scale(vae.eval(), frames, height, width))
    scheduler = CogVideoXDDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=snr_shift_scale,
    )
    pipe: Any = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_student(
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    key_value_heads: int = 2,
    vision_hidden_size: int = 32,
    vision_layers: int = 2,
    patch_size: int = 4,
    temporal_patch_size: int = 2,
    tokens_per_second: int = 2,
    max_pixels: int = 128 * 128,
    vocab_size: int = 512,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Build a tiny Qwen2.5-VL with random, untrained weights, and its processor.

    With the defaults 8 frames of 64 x 64 pixels become a grid of 4 x 8 x 8 vision tokens.

    Args:
        seed: seed of all weights; the caller's random state is left as it was.
        hidden_size, layers, heads, key_value_heads: of the language model; a head's width is even.
        vision_hidden_size, vision_layers: of the vision tower, which has 2 heads.
        patch_size: side of a vision patch in pixels; 2 x 2 patches make a token.
        temporal_patch_size: frames that make a token.
        tokens_per_second: temporal rotary positions per second; a position is rounded down to an integer.
        max_pixels: the video processor shrinks larger frames to at most this.
        vocab_size: of the tokenizer, without special tokens.

    Raises:
        ValueError: a size that the classes cannot take, by name.

    >>> model, processor = make_student(layers=1)
    >>> type(processor).__name__
    'Qwen2_5_VLProcessor'
    """
    head_dim, rest = divmod(hidden_size, heads)
    if rest or head_dim % 2 or head_dim < 8:
        raise ValueError(
            f"hidden_size must be heads ({heads}) times an even width of 8 or more, got {hidden_size}"
        )
    if key_value_heads < 1 or heads % key_value_heads:
        raise ValueError(f"key_value_heads must divide heads ({heads}), got {key_value_heads}")
    if vision_hidden_size % 8:
        raise ValueError(f"vision_hidden_size must be a multiple of 8, got {vision_hidden_size}")

    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer(vocab_size=vocab_size)
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    half = head_dim // 2
    spatial = half * 3 // 8
    token_side = 2 * patch_size
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [half - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": 2,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": temporal_patch_size,
            "tokens_per_second": tokens_per_second,
            "window_size": 4 * token_side,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_layers - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with _seeded(seed):
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=False,
    )
    shared: dict[str, Any] = {
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": 2,
        "size": {"shortest_edge": token_side**2, "longest_edge": max_pixels},
    }
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**shared, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def save_teacher(folder: str | Path, **options: Any) -> Path:
    """Write :func:`make_teacher` of ``options`` to ``folder`` as an ordinary diffusers folder."""
    pipe: Any = make_teacher(**options)
    pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def save_student(folder: str | Path, **options: Any) -> Path:
    """Write :func:`make_student` of ``options`` to ``folder`` as an ordinary transformers folder."""
    model, processor = make_student(**options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def widen(model: torch.nn.Module, seed: int) -> None:
    """Draw weights again, with a deviation of one over the root of their inputs; embeddings: one half.

    The family's 0.02 is made for wide models; at a width of 64, attention with it stays uniform for
    thousands of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                std = 0.5 if "embed_tokens" in name else weight[0].numel() ** -0.5
                weight.normal_(0.0, std, generator=generator)


def save_blank_student(folder: str | Path, seed: int = 0) -> Path:
    """Write a student of two layers with random weights that a short training can teach."""
    model, processor = make_student(seed=seed, layers=2, **STUDENT)
    widen(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
