"""Students of the real classes: a language model's layer, and a whole Qwen2.5-VL with few layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device
from .shapes import Student, dtype, randn

VIDEO, IMAGE, START, END, WORDS = 500, 501, 502, 503, 500
"""Token ids: words lie below."""


class Sequence(NamedTuple):
    """A student's batch of one, and what is read of its attention."""

    batch: dict[str, Tensor]
    rows: Tensor
    columns: slice
    grid: tuple[int, int, int]


class VideoStudent(NamedTuple):
    """A Qwen2.5-VL as wide as its case says, with few layers and a small vision tower."""

    case: str
    grid: tuple[int, int, int]
    layers: int
    heads: int
    key_heads: int
    width: int
    feed: int
    words: int = 96
    rows: int = 24


VIDEO_STUDENTS = {
    "tiny": [VideoStudent("Qwen2.5-VL, tiny", (2, 4, 4), 2, 2, 1, 16, 64, words=16, rows=5)],
    "scaled": [
        VideoStudent("Qwen2.5-VL-7B / 14, 2 layers, 480 tokens", (4, 8, 12), 2, 4, 1, 64, 512),
        VideoStudent("Qwen2.5-VL-7B / 14, 2 layers, 1632 tokens", (8, 12, 16), 2, 4, 1, 64, 512),
    ],
    "real": [
        VideoStudent(f"Qwen2.5-VL-7B, 4 of 28 layers, {tokens}k tokens", grid, 4, 28, 4, 128, 18944)
        for tokens, grid in ((4, (8, 20, 25)), (8, (16, 20, 25)), (16, (32, 20, 25)))
    ],
}


def language_layer(shape: Student) -> Any:
    """A Qwen2Model of one layer with this attention and next to no feed-forward."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=shape.heads * shape.width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=1 << 16,
        use_cache=False,
    )
    return placed(Qwen2Model, config)


def video_student(shape: VideoStudent) -> Any:
    """The whole model in training mode, random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden, half = shape.heads * shape.width, shape.width // 2
    spatial = half * 3 // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": shape.feed,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads,
            "max_position_embeddings": 1 << 16,
            "use_cache": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [half - 2 * spatial, spatial, spatial],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 32,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return placed(Qwen2_5_VLForConditionalGeneration, config)


def placed(model: Any, config: Any) -> Any:
    """A model of this configuration on the device, random weights, in training mode under sdpa."""
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(), torch.device(device.device()):
        torch.manual_seed(0)
        return model(config).to(dtype()).train()


def sequence(shape: VideoStudent, seed: int, grid: tuple[int, int, int] | None = None) -> Sequence:
    """One clip of noise among words; the last words are read and learnt."""
    frames, height, width = grid or shape.grid
    vision = frames * height * width
    words = randn(shape.words, seed=seed).mul(1000).long().remainder(WORDS)
    marks = words.new_tensor([START, *[VIDEO] * vision, END])
    before = shape.words // 4
    ids = torch.cat([words[:before], marks, words[before:]])[None]
    first, length = before + 1, ids.shape[1]
    labels = ids.clone()
    labels[:, : length - shape.words // 2] = -100
    start = length - shape.words // 2
    kinds = torch.zeros_like(ids)
    kinds[:, first : first + vision] = 2
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "mm_token_type_ids": kinds,
        "pixel_values_videos": randn(4 * vision, 3 * 2 * 16, seed=seed + 1, kind=dtype()),
        "video_grid_thw": words.new_tensor([[frames, 2 * height, 2 * width]]),
    }
    rows = torch.arange(start, length, device=ids.device)[None, : shape.rows]
    return Sequence(batch, rows, slice(first, first + vision), (frames, height, width))


@contextmanager
def implementation(model: Any, name: str | dict[str, str]) -> Iterator[None]:
    """Run a model's attention as transformers' ``name`` says; sdpa afterwards."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def eager_rows(out: Any, rows: Tensor, columns: slice) -> Tensor:
    """(1, R, C) mean over layers and heads of the maps a model returned, in float32."""
    picked = [attention.mean(1)[:, rows[0], columns].float() for attention in out.attentions]
    return torch.stack(picked).mean(0)
