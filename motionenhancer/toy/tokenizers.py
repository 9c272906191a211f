"""Real tokenizer classes of T5 and Qwen2, learnt from the toy world's sentences in a fraction of a second."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from motionenhancer.toy.language import corpus

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, T5Tokenizer

__all__ = ["CHAT_TEMPLATE", "qwen_tokenizer", "t5_tokenizer"]

QWEN_SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The family's special tokens, in the order of its own vocabulary."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- set seen = namespace(images=0, videos=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{%- set seen.videos = seen.videos + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}"
    "{{- part['text'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Renders messages to the same characters as Qwen2.5-VL's published template."""


def t5_tokenizer(texts: Iterable[str] | None = None, *, max_length: int = 48) -> T5Tokenizer:
    """Make a T5 tokenizer whose pieces are the words of ``texts`` and every printable ASCII character.

    A piece's score is its log frequency, so a known word is one token and an unknown one is spelled out;
    other characters become ``<unk>``. The result is a fast tokenizer: it gives character offsets.

    Args:
        texts: sentences to learn from; the toy world's own by default.
        max_length: the ``model_max_length`` to store, in tokens.

    >>> t5_tokenizer()("The red ring", return_offsets_mapping=True)["offset_mapping"][1]
    (4, 7)
    """
    from transformers import T5Tokenizer

    counts: Counter[str] = Counter()
    for text in corpus() if texts is None else texts:
        for word in text.split():
            core = word.rstrip(".,?!")
            counts["▁" + core] += 1
            counts.update(word[len(core) :])
    characters = [c for c in string.printable if not c.isspace()]
    floor = math.log(0.5 / max(1, sum(counts.values())))
    vocab: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", floor)]
    taken = {piece for piece, _ in vocab}
    total = sum(counts.values())
    for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if piece not in taken:
            vocab.append((piece, math.log(count / total)))
            taken.add(piece)
    vocab += [(c, 2 * floor) for c in characters if c not in taken]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def qwen_tokenizer(texts: Iterable[str] | None = None, *, vocab_size: int = 512) -> Qwen2Tokenizer:
    """Make a byte-level Qwen2 tokenizer with the family's special tokens and chat template.

    Every string can be encoded and decoded without loss: all 256 bytes are in the vocabulary.

    Args:
        texts: sentences to learn merges from; the toy world's own by default.
        vocab_size: bytes and merges together, without the special tokens; at least 256.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one token a byte, got {vocab_size}")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus() if texts is None else texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(QWEN_SPECIAL_TOKENS[1:]),
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
