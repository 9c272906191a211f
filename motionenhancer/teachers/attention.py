"""Self-attention with cross-stream memory that is read at one batch row; shared by all families."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mekernels import flash_attention

from .protocol import AttentionReader


class ReadingProcessor:
    """An attention processor of diffusers that passes its attention to a reader; see `Teacher.reading`.

    Args:
        reader: receives row `row` of the first half of a batch; without memory, of the whole batch. None
            reads nothing.
        memory: whether row i of the second half is the reference of row i of the first half, which also
            attends to it.
    """

    def __init__(self, reader: AttentionReader | None, *, memory: bool, row: int) -> None:
        self.reader, self.memory, self.row = reader, memory, row

    @torch.compiler.disable
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Self-attention of a batch: all tensors and the result are (batch, heads, tokens, width)."""
        reference = None
        if self.memory:
            half = len(query) // 2
            reference = F.scaled_dot_product_attention(query[half:], key[half:], value[half:])
            query = query[:half]
            key = torch.cat([key[:half], key[half:]], dim=2)
            value = torch.cat([value[:half], value[half:]], dim=2)
        if self.reader is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            out, lse = flash_attention(query, key, value)
            one = slice(self.row, self.row + 1)
            self.reader.self_attention(query[one], key[one], lse[one], 2 if self.memory else 1)
        return out if reference is None else torch.cat([out, reference])

    @torch.compiler.disable
    def attend_valid(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """`attend` for samples with masked padding at the end: the padding is cut off, sample by sample.

        Args:
            query, key, value: as for `attend`.
            valid: (batch,) numbers of tokens before the padding; with memory, the same in both halves.

        Returns:
            (batch, heads, tokens, width), zero at padding. No token attends to padding.
        """
        out = torch.zeros_like(query)
        half = len(query) // 2 if self.memory else len(query)
        for i, length in enumerate(valid.tolist()[:half]):
            some = (slice(i, None, half), slice(None), slice(length))
            one = ReadingProcessor(self.reader if i == self.row else None, memory=self.memory, row=0)
            out[some] = one.attend(query[some], key[some], value[some])
        return out

    def attend_text(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of vision tokens to a text; `mask` is added to the scores."""
        if self.reader is not None:
            one = slice(self.row, self.row + 1)
            self.reader.cross_attention(key[one], query[one])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
