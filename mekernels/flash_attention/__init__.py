"""Attention with the row logsumexp, from the best flash backend present."""

from .op import flash_attention

__all__ = ["flash_attention"]
