"""Entries of an attention map and sums of them, from query, key and the rows' logsumexp, without the map."""

from .op import attention_columns, attention_sums, differentiable_lse

__all__ = ["attention_columns", "attention_sums", "differentiable_lse"]
