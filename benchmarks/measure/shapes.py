"""The attention of real models, and the same scaled down to what two cores do in a second."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mekernels import VideoTokens

from . import device


class Teacher(NamedTuple):
    """Joint attention of a video diffusion transformer: a grid (F, H, W), its text, heads and their width."""

    case: str
    grid: tuple[int, int, int]
    text: int
    heads: int
    width: int
    fold: int = 1
    text_first: bool = True
    words: int = 40

    @property
    def video(self) -> VideoTokens:
        return VideoTokens(*self.grid, text=self.text, text_first=self.text_first)


class Student(NamedTuple):
    """Causal grouped-query attention of a video VLM: tokens, of which three quarters are video."""

    case: str
    tokens: int
    heads: int
    key_heads: int
    width: int
    rows: int = 24

    @property
    def columns(self) -> slice:
        return slice(16, 16 + 3 * (self.tokens - 16) // 4)


TEACHERS = {
    "tiny": [Teacher("CogVideoX, tiny", (3, 4, 6), 8, 2, 16, words=4)],
    "scaled": [
        Teacher("CogVideoX-5B / 14, 17 frames", (5, 8, 12), 32, 4, 64, words=12),
        Teacher("CogVideoX-5B / 14, 49 frames", (13, 8, 12), 32, 4, 64, words=12),
        Teacher("CogVideoX-5B / 14, 49 frames, memory", (13, 8, 12), 32, 4, 64, 2, words=12),
        Teacher("CogVideoX-1.5-5B / 16, 81 frames", (11, 12, 21), 32, 4, 64, words=12),
    ],
    "real": [
        Teacher("CogVideoX-5B, 480x720, 17 frames", (5, 30, 45), 226, 48, 64),
        Teacher("CogVideoX-5B, 480x720, 49 frames", (13, 30, 45), 226, 48, 64),
        Teacher("CogVideoX-5B, 480x720, 49 frames, memory", (13, 30, 45), 226, 48, 64, 2),
        Teacher("CogVideoX-1.5-5B, 768x1360, 81 frames", (11, 48, 85), 226, 48, 64),
        Teacher("Wan-14B, 480x832, 81 frames", (21, 30, 52), 0, 40, 128),
        Teacher("HunyuanVideo, 544x960, 129 frames", (33, 34, 60), 256, 24, 128, text_first=False),
    ],
}

STUDENTS = {
    "tiny": [Student("Qwen2.5-VL, tiny, 64 tokens", 64, 4, 2, 16, rows=5)],
    "scaled": [
        Student(f"Qwen2.5-VL-7B / 14, {tokens} tokens", tokens, 4, 1, 64) for tokens in (512, 1024, 2048)
    ],
    "real": [
        Student("InternVL3-8B, 2.5k tokens", 2560, 28, 4, 128),
        *(
            Student(f"Qwen2.5-VL-7B, {tokens >> 10}k tokens", tokens, 28, 4, 128)
            for tokens in (2048, 4096, 8192, 16384, 32768)
        ),
    ],
}


class Rows(NamedTuple):
    """Attention rows on a student's grid to be compared with a teacher's."""

    case: str
    batch: int
    rows: int
    student: tuple[int, int, int]
    teacher: tuple[int, int, int]


ROWS = {
    "tiny": [Rows("rows, tiny", 1, 3, (2, 3, 4), (3, 4, 6))],
    "scaled": [
        Rows("Qwen2.5-VL to CogVideoX-5B / 14", 1, 24, (8, 8, 12), (13, 8, 12)),
        Rows("Qwen2.5-VL to CogVideoX-5B", 1, 24, (8, 17, 26), (13, 30, 45)),
        Rows("Qwen2.5-VL to CogVideoX-1.5-5B", 1, 24, (8, 17, 26), (11, 48, 85)),
    ],
    "real": [
        Rows("InternVL3 to CogVideoX-5B", 8, 24, (8, 16, 16), (13, 30, 45)),
        Rows("Qwen2.5-VL to CogVideoX-5B", 8, 24, (8, 17, 26), (13, 30, 45)),
        Rows("Qwen2.5-VL to CogVideoX-1.5-5B", 8, 24, (8, 17, 26), (11, 48, 85)),
    ],
}


def dtype() -> torch.dtype:
    """What such models run in here."""
    return torch.bfloat16 if device.on_gpu() else torch.float32


def randn(*size: int, seed: int, kind: torch.dtype | None = None) -> torch.Tensor:
    """Seeded normal numbers on the device, float32 unless told."""
    generator = torch.Generator(device.device()).manual_seed(seed)
    values = torch.randn(size, generator=generator, device=device.device())
    return values.to(kind or torch.float32)
