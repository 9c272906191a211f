"""Tiny HunyuanVideo pipelines of diffusers' own classes, saved as ordinary folders."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from motionenhancer.toy.language import corpus
from motionenhancer.toy.tokenizers import CHAT_TEMPLATE

#: Llama 3's, which makes 95 tokens of what stands before a prompt.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_tokenizer(specials: list[str], texts: list[str], *, start: str | None, **names: str) -> Any:
    """A byte-level tokenizer that knows each word of the texts."""
    learner: Any = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
        ),
    )
    if start is not None:
        learner.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, specials.index(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=learner, model_max_length=8192, **names)


def llama_tokenizer() -> Any:
    specials = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    texts = [DEFAULT_PROMPT_TEMPLATE["template"], *list(corpus())[:200]]
    names = {"bos_token": specials[1], "eos_token": specials[4], "pad_token": specials[0]}
    return byte_tokenizer(specials, texts, start=specials[1], **names)


def sharpen(module: Any) -> None:
    """Fresh weights attend almost evenly; larger norms give the maps something to tell apart."""
    for name, parameter in module.named_parameters():
        if any(part in name for part in ("norm_q.", "norm_k.", "norm_added_q.", "norm_added_k.")):
            parameter.data.mul_(2)


def save_hunyuan(path: Path, *, guidance_embeds: bool = True, **transformer: Any) -> Path:
    """Write a HunyuanVideo pipeline of three heads, two double and one single block."""
    tokenizer = llama_tokenizer()
    clip = byte_tokenizer(["<pad>", "<s>", "</s>"], list(corpus())[:200], start="<s>", pad_token="<pad>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer), num_hidden_layers=4, num_key_value_heads=2, pad_token_id=0, **sizes
            )
        )
        second = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), num_hidden_layers=1, **{**sizes, "hidden_size": 24}, eos_token_id=2
            )
        )
        model: Any = HunyuanVideoTransformer3DModel(
            **{
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 3,
                "attention_head_dim": 16,
                "num_layers": 2,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "guidance_embeds": guidance_embeds,
                "text_embed_dim": 32,
                "pooled_projection_dim": 24,
                "rope_axes_dim": (4, 6, 6),
                **transformer,
            }
        )
        sharpen(model)
    pipeline: Any = HunyuanVideoPipeline(
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=model.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=second.eval(),
        tokenizer_2=clip,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def template_tokenizer() -> Any:
    """Qwen's kind, which makes 108 tokens of what stands before a prompt."""
    parameters = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    texts = [parameters["system_message"].default, "system\n user\n assistant\n", *list(corpus())[:200]]
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(specials, texts, start=None, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_hunyuan15(path: Path, **transformer: Any) -> Path:
    """Write a HunyuanVideo 1.5 pipeline of three heads and two blocks."""
    tokenizer = template_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1
        )
        encoder = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_hidden_layers=4,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [2, 3, 3],
                },
            )
        )
        second = T5EncoderModel(
            T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
        model: Any = HunyuanVideo15Transformer3DModel(
            **{
                "in_channels": 9,
                "out_channels": 4,
                "num_attention_heads": 3,
                "attention_head_dim": 16,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": 32,
                "text_embed_2_dim": 24,
                "image_embed_dim": 16,
                "rope_axes_dim": (4, 6, 6),
                "task_type": "t2v",
                **transformer,
            }
        )
        sharpen(model)
    pipeline: Any = HunyuanVideo15Pipeline(
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=model.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=second.eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path
