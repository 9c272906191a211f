"""What the tiny students share: sizes of their language models, chat templates, a tokenizer."""

from __future__ import annotations

import json
from typing import Any

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
    """Like Qwen3.5's template: answers after the last question begin with thoughts, earlier ones do not."""
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
    """Like LLaVA-OneVision's template: images, then videos, then texts of a message, each on its own line.

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


def _parts(shown: dict[str, str], text: str = "part['text']") -> str:
    """The parts of a message, in order: what is shown of each kind of media, and texts."""
    media = "".join(
        "{%- if part['type'] == '" + kind + "' -%}{{- " + repr(mark) + " -}}{%- endif -%}"
        for kind, mark in shown.items()
    )
    text = "{%- if part['type'] == 'text' -%}{{- " + text + " -}}{%- endif -%}"
    return "{%- for part in message['content'] -%}" + media + text + "{%- endfor -%}"


def glm_template(image: str, video: str, blocks: bool = False) -> str:
    """Like GLM-4.1V's template, whose prompt opens a block of thoughts; only the next role ends an answer.

    With ``blocks`` like GLM-4.5V's and 4.6V's: each answer has a block of thoughts, which is empty before the
    last question and in an answer without thoughts, and is not in the prompt.
    """
    parts = _parts({"image": image, "video": video})
    opened = "" if blocks else "\\n<think>"
    if blocks:
        parts = (
            "{%- set text -%}" + parts + "{%- endset -%}"
            "{%- if message['role'] == 'assistant' -%}{%- set thoughts = '' -%}"
            "{%- if '</think>' in text -%}"
            "{%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip() -%}"
            "{%- set text = text.split('</think>')[-1] -%}{%- endif -%}"
            "{%- if loop.index0 < last.question -%}{%- set thoughts = '' -%}{%- endif -%}"
            "{{- '<think>' + thoughts + '</think>\\n' + text.strip() -}}"
            "{%- else -%}{{- text -}}{%- endif -%}"
        )
    return (
        "{%- set last = namespace(question=-1) -%}{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}{{- '[gMASK]<sop>' -}}"
        "{%- for message in messages -%}{{- '<|' + message['role'] + '|>\\n' -}}" + parts + "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>" + opened + "' -}}{%- endif -%}"
    )


def gemma_template(image: str, video: str) -> str:
    """Like Gemma 4's template: it drops thoughts from every answer; the prompt has an empty block of them."""
    shown = (
        "part['text'].split('<channel|>')[-1] | trim"
        " if message['role'] == 'assistant' else part['text'] | trim"
    )
    return (
        "{%- for message in messages -%}"
        "{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
        + _parts({"image": f"\n\n{image}\n\n", "video": f"\n\n{video}\n\n"}, f"({shown})")
        + "{{- '<turn|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}{%- endif -%}"
    )
