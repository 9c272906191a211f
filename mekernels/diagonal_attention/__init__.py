"""Attention between the same position of all pairs of frames."""

from .op import diagonal_attention

__all__ = ["diagonal_attention"]
