"""A tiny student whose attention is far from uniform, batches for it, and what eager attention says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.students import capture_attention, student_family
from motionenhancer.toy.models import make_student

TEXTS = [
    ("Which object moves left?", "The red circle moves left and the blue square stays."),
    ("What moves?", "A green one."),
    ("Describe the motion.", "Everything turns, then stops."),
]


def sharp_student(layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A student and its processor; larger query and key weights make the attention peaked."""
    model, processor = make_student(seed=seed, layers=layers, **options)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if re.search(r"[qk]_proj\.weight", name):
                parameter *= 12
    return model.to(dtype), processor


def clip(frames: int, height: int, width: int, fps: float = 2.0, seed: int = 0) -> Video:
    """Noise as a decoded clip."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Video(pixels, np.arange(frames) / fps, fps, frames / fps, decoded=frames, source_frames=frames)


def dialogue(*turns: str, videos: int = 1, name: str = "sample") -> Sample:
    """A conversation of alternating turns; the first shows the videos."""
    messages: list[dict[str, Any]] = []
    for i, text in enumerate(turns):
        shown = [{"type": "video"}] * videos if i == 0 else []
        messages.append(
            {"role": "assistant" if i % 2 else "user", "content": [*shown, {"type": "text", "text": text}]}
        )
    return Sample(name, messages)


def make_batch(
    processor: Any, samples: int = 2, side: str = "right", dtype: torch.dtype = torch.float32
) -> Any:
    """A padded batch and its layouts; labels leave out what a padding token would predict."""
    family = student_family("qwen2_5_vl")
    encoded = [
        family.encode(processor, dialogue(*TEXTS[i]), [clip(4 - 2 * (i % 2), 32, 48, seed=i)])
        for i in range(samples)
    ]
    batch = family.collate(encoded, pad_token_id=processor.tokenizer.pad_token_id, padding_side=side)
    layouts = batch.pop("layouts")
    batch["pixel_values_videos"] = batch["pixel_values_videos"].to(dtype)
    return batch, layouts


def random_rows(
    batch: dict[str, torch.Tensor], count: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns at random real tokens, with some padding entries."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = [], []
    for mask in batch["attention_mask"]:
        real = mask.nonzero()[:, 0]
        rows.append(real[torch.randint(len(real), (count,), generator=generator)])
        columns.append(real[torch.randint(len(real), (2 * count,), generator=generator)])
    chosen, read = torch.stack(rows), torch.stack(columns)
    chosen[-1, -1] = read[0, 0] = -1
    return chosen, read


def pick(attention: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows and columns of (B, N, N) maps, zero where an index is negative."""
    picked = [a[r.clamp(min=0)][:, c.clamp(min=0)] for a, r, c in zip(attention, rows, columns, strict=True)]
    return torch.stack(picked) * (rows >= 0)[..., None] * (columns >= 0)[:, None]


@contextlib.contextmanager
def full_precision_softmax() -> Iterator[None]:
    """Eager attention takes its softmax in float32; let a model in double precision keep its own."""
    original = torch.nn.functional.softmax

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return original(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.softmax = original


@contextlib.contextmanager
def full_precision_modules() -> Iterator[None]:
    """Norms and linear attention convert to float32; let a model in double precision keep its own.

    Without it, a difference in a double's last bit can change a float32's last bit, and a result by 1e-7.
    """
    to_float, to = torch.Tensor.float, torch.Tensor.to
    inside = 0

    def converts(module: torch.nn.Module) -> bool:
        return any(part in type(module).__name__ for part in ("Norm", "DeltaNet"))

    def enter(module: torch.nn.Module, args: Any) -> None:
        nonlocal inside
        inside += converts(module)

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside -= converts(module)

    def stays(x: torch.Tensor) -> bool:
        return inside > 0 and x.dtype == torch.float64

    def own_to(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return x if args[:1] == (torch.float32,) and stays(x) else to(x, *args, **options)

    hooks = torch.nn.modules.module
    with (
        pytest.MonkeyPatch.context() as patch,
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ):
        patch.setattr(torch.Tensor, "float", lambda x: x if stays(x) else to_float(x))
        patch.setattr(torch.Tensor, "to", own_to)
        yield


def eager_attention(model: Any, batch: dict[str, Any], rows: torch.Tensor, columns: torch.Tensor) -> Any:
    """The same entries of transformers' own ``output_attentions``, and the model's output."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with full_precision_softmax():
            out = model(**batch, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return pick(torch.stack(out.attentions).mean(dim=(0, 2)), rows, columns), out


def gradients(model: Any, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of ``scalar`` in all parameters; the model's own are cleared."""
    model.zero_grad()
    scalar.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@contextlib.contextmanager
def kept_numbers() -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for backward, and how many bytes each has."""
    kept: dict[int, int] = {}
    held: list[Any] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def count(packed: Any) -> Any:
        for tensor in packed if isinstance(packed, tuple) else (packed,):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return packed

    class Counting(hooks):  # type: ignore[misc,valid-type]
        def __init__(self, pack: Any, unpack: Any) -> None:
            super().__init__(lambda tensor: count(pack(tensor)), unpack)

    with pytest.MonkeyPatch.context() as patch, hooks(lambda tensor: count(tensor.detach()), lambda t: t):
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
        yield kept


def assert_keeps_a_third(model: Any) -> None:
    """At 2,048 tokens, a captured forward keeps less than a third of the bytes of an eager one with maps."""
    ids = torch.randint(300, (1, 2048), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    rows, columns = torch.arange(2000, 2016)[None], torch.arange(1024)[None]
    with kept_numbers() as eager:
        eager_attention(model, batch, rows, columns)
    with kept_numbers() as watched, capture_attention(model, rows, columns):
        model(**batch)
    assert sum(watched.values()) * 3 < sum(eager.values())


def checkpoint_layers(model: Any, **options: Any) -> None:
    """Switch gradient checkpointing on and train; transformers renamed the method in 5.2x."""
    options = options or {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()


def restore(model: Any) -> None:
    """Undo what a test may have switched on."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    model.eval()
