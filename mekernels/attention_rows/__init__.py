"""Chosen rows and columns of an attention map, exact and differentiable, without the map."""

from .op import attention_rows
from .shared_query import picked_rows, share_query

__all__ = ["attention_rows", "picked_rows", "share_query"]
