"""Tiny students of the other families: the real transformers classes with small numbers in their configs.

Each function returns a model with peaked attention and its processor, written to a folder and read again.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from motionenhancer.students import load_student
from motionenhancer.students.locate import text_model
from motionenhancer.toy.tokenizers import QWEN_SPECIAL_TOKENS, qwen_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
QWEN2_TEXT = {"model_type": "qwen2", **TEXT}
#: Two layers of linear attention, two that attend to all tokens.
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def chat_template(image: str, video: str) -> str:
    """ChatML with the given placeholders where the media are."""
    return (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- " + repr(image) + " -}}"
        "{%- elif part['type'] == 'video' -%}{{- " + repr(video) + " -}}"
        "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def thinking_template(image: str, video: str) -> str:
    """As Qwen3.5's: answers behind the last question begin with their thoughts, earlier ones have none."""
    answer = (
        "{%- set thoughts = '' -%}{%- if '</think>' in text -%}"
        "{%- set thoughts = text.split('</think>')[0].split('<think>')[-1] | trim -%}"
        "{%- set text = text.split('</think>')[-1] | trim -%}{%- endif -%}"
        "{%- if loop.index0 > last.question -%}"
        "{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' -}}{%- endif -%}"
    )
    return (
        "{%- set last = namespace(question=-1) -%}{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- set text -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- " + repr(image) + " -}}"
        "{%- elif part['type'] == 'video' -%}{{- " + repr(video) + " -}}"
        "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endset -%}"
        "{%- if message['role'] == 'assistant' -%}"
        + answer
        + "{{- text -}}{%- else -%}{{- text -}}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
    )


def media_first_template() -> str:
    """As LLaVA-OneVision's: a message's images, its videos, then its texts, each on a line of its own.

    A message begins with a space that the prompt for an answer does not have.
    """
    loops = [
        "{%- for part in message['content'] -%}{%- if part['type'] == '" + kind + "' -%}{{- " + shown
        + " -}}{%- endif -%}{%- endfor -%}"
        for kind, shown in (("image", "'<image>'"), ("video", "'<video>'"), ("text", "'\\n' + part['text']"))
    ]  # fmt: skip
    return (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + ' ' -}}"
        + "".join(loops)
        + "{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def tokenizer_with(template: str, **named: str) -> Any:
    """The toy world's Qwen2 tokenizer with further special tokens, each also an attribute by its name."""
    from transformers import Qwen2Tokenizer

    model = json.loads(qwen_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*QWEN_SPECIAL_TOKENS[1:], *named.values()],
        model_specific_special_tokens=named,
        model_max_length=4096,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_internvl(folder: Path, seed: int = 0, image_size: int = 16) -> Path:
    """InternVL3 with one square of ``image_size / 8`` tokens a side for each frame."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = tokenizer_with(
        chat_template("<IMG_CONTEXT>\n", "<video>\n"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tokens = (image_size // 4 // 2) ** 2
    config = InternVLConfig(
        text_config={**QWEN2_TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "image_size": [image_size, image_size],
            "patch_size": [4, 4],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    size = {"height": image_size, "width": image_size}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens,
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, InternVLForConditionalGeneration, config, processor, seed)


def save_qwen(folder: Path, seed: int = 0, kind: str = "qwen3_vl") -> Path:
    """Qwen2-VL to Qwen3.5: patches of 4 pixels, 2 x 2 of them and two frames a token."""
    import transformers as hf

    tokenizer = qwen_tokenizer()
    media = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
    tokenizer.chat_template = (thinking_template if kind.startswith("qwen3_5") else chat_template)(**media)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL_TOKENS}
    names = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
    name = names.get(kind, "Qwen3_5Moe" if kind.endswith("moe") else "Qwen3_5")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    text: dict[str, Any] = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 16, "rope_parameters": rope}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    if kind == "qwen2_vl":
        rope["mrope_section"] = [2, 1, 1]
        del text["head_dim"]
        vision |= {"embed_dim": 32, "mlp_ratio": 1}
    else:
        rope["mrope_interleaved"] = True
    if kind.startswith("qwen3_5"):
        text |= HYBRID
    if kind.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        text |= {"shared_expert_intermediate_size": 16}
    config = getattr(hf, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    shared: dict[str, Any] = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 128 * 128 * 16},
    }
    generation = "2" if kind == "qwen2_vl" else "3"
    processor = getattr(hf, f"Qwen{generation}VLProcessor")(
        image_processor=hf.Qwen2VLImageProcessor(**shared),
        tokenizer=tokenizer,
        video_processor=getattr(hf, f"Qwen{generation}VLVideoProcessor")(
            **shared, cap_pixels_per_frame=False
        ),
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, getattr(hf, f"{name}ForConditionalGeneration"), config, processor, seed)


def save_llava_onevision(folder: Path, seed: int = 0) -> Path:
    """LLaVA-OneVision with 20 x 20 pixels a frame: 5 x 5 patches, pooled to 3 x 3 tokens."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = tokenizer_with(
        media_first_template(),
        image_token="<image>",
        video_token="<video>",
    )
    pinpoints = [[20, 20], [20, 40], [40, 20], [40, 40]]
    config = LlavaOnevisionConfig(
        text_config={**QWEN2_TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "patch_size": 4,
            "image_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": 20, "width": 20}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, LlavaOnevisionForConditionalGeneration, config, processor, seed)


_QWEN = ("qwen3_vl", "qwen2_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
SAVE: dict[str, Any] = {kind: partial(save_qwen, kind=kind) for kind in _QWEN}
SAVE |= {"internvl": save_internvl, "llava_onevision": save_llava_onevision}


def _save(folder: Path, model_class: Any, config: Any, processor: Any, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    with torch.no_grad():
        # Small random weights attend almost uniformly.
        for name, parameter in text_model(model).named_parameters():
            if re.search(r"[qk]_proj\.weight", name):
                parameter *= 12
            if re.search(r"[qk]_norm\.weight", name):
                parameter *= 1.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_student(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Model, processor and family of a student that was saved and loaded again."""
    model, processor, family = load_student(SAVE[name](folder), dtype=dtype)
    # Grouped products of experts have no double precision.
    model.set_experts_implementation("eager")
    return model, processor, family
