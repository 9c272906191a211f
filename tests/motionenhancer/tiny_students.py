"""Tiny students of the other families: the real transformers classes with small numbers in their configs.

Each function returns a model with peaked attention and its processor, written to a folder and read again.
"""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_templates import (
    HYBRID,
    QWEN2_TEXT,
    TEXT,
    chat_template,
    gemma_template,
    glm_template,
    media_first_template,
    thinking_template,
    tokenizer_with,
)

from motionenhancer.students import load_student
from motionenhancer.students.locate import text_model
from motionenhancer.toy.tokenizers import QWEN_SPECIAL_TOKENS, qwen_tokenizer


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


def save_glm(folder: Path, seed: int = 0, kind: str = "glm4v") -> Path:
    """GLM-4.1V and 4.6V: patches of 4 pixels, 2 x 2 of them and two frames a token."""
    import transformers as hf

    media = {
        f"{end}_{kind}": f"<|{end}_of_{kind}|>" for end in ("begin", "end") for kind in ("image", "video")
    }
    tokenizer = tokenizer_with(
        glm_template(
            "<|begin_of_image|><|image|><|end_of_image|>",
            "<|begin_of_video|><|video|><|end_of_video|>",
            blocks=kind != "glm4v",
        ),
        image_token="<|image|>",
        video_token="<|video|>",
        **media,
        **{name: f"<|{name}|>" for name in ("system", "user", "assistant")},
        mask="[gMASK]",
        sop="<sop>",
    )
    name = {"glm4v": "Glm4v", "glm4v_moe": "Glm4vMoe", "glm46v": "Glm46V"}[kind]
    ids = tokenizer.convert_tokens_to_ids
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    }
    text = {**TEXT, "hidden_size": 64, "vocab_size": len(tokenizer), "rope_parameters": rope, "head_dim": 16}
    if kind == "glm4v_moe":
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        text |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    config = getattr(hf, f"{name}Config")(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "out_hidden_size": 64,
        },
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
    )
    shared: dict[str, Any] = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 128 * 128 * 16},
    }
    parts = "Glm46V" if kind == "glm46v" else "Glm4v"
    processor = getattr(hf, f"{parts}Processor")(
        image_processor=getattr(hf, f"{parts}ImageProcessor")(**shared),
        tokenizer=tokenizer,
        video_processor=getattr(hf, f"{parts}VideoProcessor")(**shared),
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, getattr(hf, f"{name}ForConditionalGeneration"), config, processor, seed)


def save_gemma4(folder: Path, seed: int = 1) -> Path:
    """Gemma 4 with 2 x 2 patches of 4 pixels a token, and a window of 16 tokens in two of four layers.

    Seed 0 gives a tower whose gradient has a hundred times the rounding error of those of seeds 1 to 3.
    """
    import transformers as hf

    template = gemma_template("<|image|>", "<|video|>")
    names = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>", "audio": "<|audio|>"}
    names |= {"boa": "<|audio>", "eoa": "<audio|>"}
    marks = {"turn": "<|turn>", "turn_end": "<turn|>", "channel": "<|channel>", "channel_end": "<channel|>"}
    tokenizer = tokenizer_with(template, **{f"{k}_token": v for k, v in names.items()}, **marks)
    sizes = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=hf.Gemma4VideoProcessor(**sizes),
        chat_template=template,
    )
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}
    config = hf.Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "head_dim": 16,
            "global_head_dim": 32,
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "use_bidirectional_attention": "vision",
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 64,
            "pooling_kernel_size": 2,
        },
        video_token_id=processor.video_token_id,
        **ids,
    )
    return _save(folder, hf.Gemma4ForConditionalGeneration, config, processor, seed)


def save_video_llama(folder: Path, seed: int = 0) -> Path:
    """VideoLLaMA3 with patches of 4 pixels, 2 x 2 of them a token; tokens that did not change are dropped."""
    import transformers as hf

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = chat_template("<|image_pad|>", "<|video_pad|>")
    config = hf.VideoLlama3Config(
        text_config={**QWEN2_TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    size = {"shortest_edge": 64, "longest_edge": 128 * 128 * 16}
    processor = hf.VideoLlama3Processor(
        image_processor=hf.VideoLlama3ImageProcessor(patch_size=4, merge_size=1, size=size),
        tokenizer=tokenizer,
        video_processor=hf.VideoLlama3VideoProcessor(patch_size=4, merge_size=2, size=size),
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, hf.VideoLlama3ForConditionalGeneration, config, processor, seed)


def save_smolvlm(folder: Path, seed: int = 0) -> Path:
    """SmolVLM2 with 16 x 16 pixels a frame: 4 x 4 patches, 2 x 2 of them a token."""
    import transformers as hf

    names = {"image": "<image>", "video": "<video>", "fake_image": "<fake_token_around_image>"}
    names |= {"global_image": "<global-img>", "end_of_utterance": "<end_of_utterance>"}
    tokenizer = tokenizer_with(
        chat_template("<image>", "<video>"),
        **{f"{name}_token": token for name, token in names.items()},
        **{f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
    )
    config = hf.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(**sizes, num_frames=8, fps=1),
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, hf.SmolVLMForConditionalGeneration, config, processor, seed)


def save_minicpm(folder: Path, seed: int = 0, slices: int = 1, kind: str = "6") -> Path:
    """MiniCPM-V 4.6 or 4.7: patches of 4 pixels, 4 x 4 of them a token, and a hybrid language model."""
    import transformers as hf

    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "image_start": "<image>"}
    names |= {"image_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"}
    names |= {"image_id_start": "<image_id>", "image_id_end": "</image_id>"}
    tokenizer = tokenizer_with(
        thinking_template("<|image_pad|>", "<|video_pad|>"),
        **{f"{name}_token": token for name, token in names.items()},
    )
    ids = tokenizer.convert_tokens_to_ids
    marks = {}
    if kind == "7":
        marks = {f"{name}_id": ids(names[name]) for name in ("image_start", "image_end")}
        marks |= {f"{name}_id": ids(names[name]) for name in ("slice_start", "slice_end")}
        (marks["newline_id"],) = tokenizer("\n").input_ids
    config = getattr(hf, f"MiniCPMV4_{kind}Config")(
        text_config={**TEXT, **HYBRID, "model_type": "qwen3_5_text", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        insert_layer_id=0,
        image_size=32,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        **marks,
    )
    sizes = {"patch_size": 4, "scale_resolution": 48, "max_slice_nums": slices}
    processor = getattr(hf, f"MiniCPMV4_{kind}Processor")(
        image_processor=hf.MiniCPMV4_6ImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=hf.MiniCPMV4_6VideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    model = getattr(hf, f"MiniCPMV4_{kind}ForConditionalGeneration")
    return _save(folder, model, config, processor, seed)


def save_llava_video(folder: Path, seed: int = 0, kind: str = "llava_next_video") -> Path:
    """LLaVA-NeXT-Video (3 x 3 tokens a frame) and Video-LLaVA (6 x 6 and one more) of 24 x 24 pixels."""
    import transformers as hf

    tokenizer = tokenizer_with(
        chat_template("<image>\n", "<video>\n"), image_token="<image>", video_token="<video>"
    )
    name = {"llava_next_video": "LlavaNextVideo", "video_llava": "VideoLlava"}[kind]
    pinpoints = [[24, 24], [24, 48], [48, 24], [48, 48]]
    own = {"image_grid_pinpoints": pinpoints} if kind == "llava_next_video" else {}
    config = getattr(hf, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "patch_size": 4,
            "image_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        **own,
    )
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    images = {"llava_next_video": "LlavaNext", "video_llava": "VideoLlava"}[kind]
    processor = getattr(hf, f"{name}Processor")(
        image_processor=getattr(hf, f"{images}ImageProcessor")(**sizes, **own),
        tokenizer=tokenizer,
        video_processor=getattr(hf, f"{name}VideoProcessor")(**sizes),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, getattr(hf, f"{name}ForConditionalGeneration"), config, processor, seed)


_QWEN = ("qwen3_vl", "qwen2_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
SAVE: dict[str, Any] = {kind: partial(save_qwen, kind=kind) for kind in _QWEN}
SAVE |= {kind: partial(save_glm, kind=kind) for kind in ("glm4v", "glm4v_moe", "glm46v")}
SAVE |= {kind: partial(save_llava_video, kind=kind) for kind in ("llava_next_video", "video_llava")}
SAVE |= {"video_llama_3": save_video_llama, "minicpmv4_6": save_minicpm}
if importlib.util.find_spec("transformers.models.minicpmv4_7"):
    SAVE["minicpmv4_7"] = partial(save_minicpm, kind="7")
if importlib.util.find_spec("num2words"):
    SAVE["smolvlm"] = save_smolvlm
SAVE |= {"gemma4": save_gemma4, "internvl": save_internvl, "llava_onevision": save_llava_onevision}


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
