"""Attention and the row logsumexp, from the fastest installed flash backend."""

from .op import flash_attention

__all__ = ["flash_attention"]
