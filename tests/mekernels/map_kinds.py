"""Queries and keys whose attention maps look like those of real heads."""

from __future__ import annotations

import math

import torch
from kernel_support import randn
from torch import Tensor

from mekernels import VideoTokens

KINDS = ("local", "diagonal", "diffuse", "sink", "text", "uneven")
"""Near neighbours; the same position over time; almost even; a few keys for all; mostly text; some rows
sharp and the others even."""

WIDTH = 32


def waves(place: Tensor, count: int) -> Tensor:
    """(N, 2 * count) codes whose products fall with the distance of places in [0, 1)."""
    angle = place[:, None] * torch.arange(1, count + 1, dtype=place.dtype) * math.pi / 2
    return torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(count)


def head(kind: str, video: VideoTokens, strength: float, seed: int) -> tuple[Tensor, Tensor]:
    """Query and key (N, WIDTH) of one head, float64; ``strength`` is from 0, uniform attention, to 1."""
    query, key = randn(video.length, WIDTH, seed=2 * seed), randn(video.length, WIDTH, seed=2 * seed + 1)
    query, key = 0.8 * query, 0.8 * key
    sharp = WIDTH**0.5 * (1 + 6 * strength)
    token = torch.arange(video.vision, dtype=torch.float64)
    frame, position = token // video.positions, (token % video.positions).long()
    row, column = position // video.width, position % video.width
    vision, text = video.vision_slice, video.text_slice
    if kind == "local":
        codes = [waves(frame / video.frames, 3), waves(row / video.height, 4), waves(column / video.width, 4)]
        code = torch.nn.functional.pad(torch.cat(codes, 1), (0, WIDTH - 22))
        query[vision] += sharp * code
        key[vision] += code
    elif kind == "diagonal":
        code = torch.nn.functional.normalize(randn(video.positions, WIDTH, seed=seed + 77), dim=1)[position]
        query[vision] += sharp * code
        key[vision] += code
    elif kind == "sink":
        query[:, 0] += sharp
        chosen = torch.randperm(video.vision, generator=torch.Generator().manual_seed(seed))[:3]
        key[vision][chosen, 0] += 1
    elif kind == "text":
        query[:, 0] += sharp
        key[text, 0] += 1.5
    elif kind == "uneven":
        code = torch.nn.functional.normalize(randn(video.vision, WIDTH, seed=seed + 99), dim=1)
        few = torch.rand(video.vision, generator=torch.Generator().manual_seed(seed)) < 0.15
        query[vision] += 1.6 * sharp * code * few[:, None]
        key[vision] += code
    return query, key


def layer(kinds: list[tuple[str, float]], video: VideoTokens, seed: int) -> tuple[Tensor, Tensor]:
    """Query and key (1, H, N, WIDTH) of heads given as (kind, strength)."""
    heads = [head(kind, video, strength, 1000 * seed + i) for i, (kind, strength) in enumerate(kinds)]
    query, key = (torch.stack(items)[None] for items in zip(*heads, strict=True))
    return query, key
