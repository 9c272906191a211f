"""Attention evidence without attention maps.

Any flash attention hands back the logsumexp of its rows; with it every chosen entry of the attention map is
one dot product and one exponential away, exactly. The ops here read such entries, pool them and score them,
in memory far below the map's.
"""

from . import reference
from .backends import BackendError, use_backend
from .layout import VideoTokens
from .ops.align_rows import align_rows
from .ops.attention_rows import attention_rows
from .ops.diagonal_attention import diagonal_attention
from .ops.flash_attention import flash_attention
from .ops.motion_scores import MotionScores, motion_scores
from .ops.motion_statistics import MotionStatistics
from .ops.resample_rows import resample_rows
from .ops.row_l2_loss import row_l2_loss
from .ops.selection import select_heads, select_tokens
from .ops.token_motion_scores import token_motion_scores

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "MotionScores",
    "MotionStatistics",
    "VideoTokens",
    "align_rows",
    "attention_rows",
    "diagonal_attention",
    "flash_attention",
    "motion_scores",
    "reference",
    "resample_rows",
    "row_l2_loss",
    "select_heads",
    "select_tokens",
    "token_motion_scores",
    "use_backend",
]
