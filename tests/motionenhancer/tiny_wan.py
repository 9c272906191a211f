"""Tiny Wan pipelines of diffusers' own classes, saved as ordinary folders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from motionenhancer.priors.prior_settings import PriorSettings, check_settings
from motionenhancer.teachers import load_teacher
from motionenhancer.toy.tokenizers import t5_tokenizer


def make_transformer(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 64,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    transformer: Any = WanTransformer3DModel(**{**config, **options})
    # Fresh weights attend almost evenly; larger projections give the maps something to tell apart.
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.weight.data.mul_(2)
    return transformer.eval()


def save_wan(
    path: Path,
    *,
    experts: tuple[int | None, int | None] = (0, None),
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    **transformer: Any,
) -> Path:
    """Write a pipeline.

    Args:
        path: a new folder.
        experts: seeds of the weights of `transformer` and `transformer_2`; None leaves one out.
        boundary_ratio: of the pipeline.
        expand_timesteps: build TI2V-5B's kind: a time step for each token, and a VAE that folds patches.
        **transformer: further fields of both transformers.
    """
    tokenizer = t5_tokenizer(max_length=512)
    folding: dict[str, Any] = {}
    if expand_timesteps:
        folding = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
        folding |= {"latents_mean": [0.1] * 48, "latents_std": [0.5] * 48, "scale_factor_spatial": 16}
    channels = 48 if expand_timesteps else 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            **folding,
        )
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        )
        widths = {"in_channels": channels, "out_channels": channels, **transformer}
        models = [None if seed is None else make_transformer(seed, **widths) for seed in experts]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipeline: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=models[0],
        transformer_2=models[1],
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; `...` takes one out."""
    content = json.loads(file.read_text())
    for name, value in fields.items():
        if value is ...:
            content.pop(name, None)
        else:
            content[name] = value
    file.write_text(json.dumps(content))


def refused(source: Path, copy: Path, file: str, field: str, value: Any, says: str) -> None:
    """A copy of a teacher's folder that has the value is refused by the names of the file and the field."""
    shutil.copytree(source, copy)
    edit(copy / file, **{field: value})
    match = f"{re.escape(str(copy / file))}: {says if says.startswith('names') else f'{field} .*{says}'}"
    for use in (lambda: check_settings(PriorSettings(), copy), lambda: load_teacher(copy, "cpu")):
        with pytest.raises(ValueError, match=match):
            use()
