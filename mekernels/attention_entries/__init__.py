"""Entries of an attention map and sums of them, from query, key and the rows' logsumexp, without the map."""

from .head_statistics import HeadStatistics, head_statistics
from .op import attention_columns, attention_lse, attention_sums, differentiable_lse

__all__ = [
    "HeadStatistics",
    "attention_columns",
    "attention_lse",
    "attention_sums",
    "differentiable_lse",
    "head_statistics",
]
