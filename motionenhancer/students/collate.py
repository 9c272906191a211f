"""Pad and stack encoded samples: shared by all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .layout import Encoded


def joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate a vision input of several media.

    In a (images, tiles, channels, height, width) tensor, images with fewer tiles get empty tiles, which
    models ignore.

    Raises:
        ValueError: the tensors do not fit together.
    """
    if dim == 0 and tensors[0].dim() == 5:
        most = max(tensor.shape[1] for tensor in tensors)
        pads = [(0, 0) * 3 + (0, most - tensor.shape[1]) for tensor in tensors]
        tensors = [torch.nn.functional.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)]
    try:
        return torch.cat(list(tensors), dim)
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"videos or images of a batch must have the same shape, got {shapes}") from error


def collate(
    samples: Sequence[Encoded],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
    join: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Pad token tensors to one length, concatenate vision tensors, and move the layouts along.

    Args:
        samples: at least one sample.
        pad_token_id: fills ``input_ids``; ``labels`` are filled with -100 and everything else with 0.
        padding_side: ``"right"`` or ``"left"``.
        pad_to_multiple_of: the length is rounded up to a multiple of this.
        join: name of a vision input → dimension of its concatenation, if not 0.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and the samples' token inputs, (B, N) int64; their
        vision inputs, concatenated; ``layouts``, a list of
        :class:`~motionenhancer.students.layout.TokenLayout` in positions of the padded batch.

    Raises:
        ValueError: there are no samples, the padding side is unknown, or samples have different token inputs.
    """
    if not samples:
        raise ValueError("samples must not be empty")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be positive, got {pad_to_multiple_of}")
    names = set(samples[0].token_inputs)
    if any(set(sample.token_inputs) != names for sample in samples):
        raise ValueError("all samples must have the same names in token_inputs")
    length = max(len(sample.input_ids) for sample in samples)
    if pad_to_multiple_of is not None:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of

    def padded(tensors: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        batch = tensors[0].new_full((len(tensors), length), fill)
        for row, tensor in zip(batch, tensors, strict=True):
            row[length - len(tensor) if padding_side == "left" else 0 :][: len(tensor)] = tensor
        return batch

    batch: dict[str, Any] = {
        "input_ids": padded([sample.input_ids for sample in samples], pad_token_id),
        "attention_mask": padded([sample.attention_mask for sample in samples], 0),
        "labels": padded([sample.labels for sample in samples], -100),
    }
    for name in samples[0].token_inputs:
        batch[name] = padded([sample.token_inputs[name] for sample in samples], 0)
    for name in dict.fromkeys(name for sample in samples for name in sample.vision_inputs):
        given = [sample.vision_inputs[name] for sample in samples if name in sample.vision_inputs]
        batch[name] = joined(given, (join or {}).get(name, 0))
    batch["layouts"] = [
        sample.layout.shifted(length - len(sample.input_ids) if padding_side == "left" else 0)
        for sample in samples
    ]
    return batch
