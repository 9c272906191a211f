"""Chosen rows and columns of an attention map, exact and differentiable, without the map."""

from .op import attention_rows

__all__ = ["attention_rows"]
