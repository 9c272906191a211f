"""Attention evidence without attention maps.

Any flash attention returns the logsumexp of its rows. With it, one dot product and one exponential give any
entry of the attention map exactly. The ops here read such entries, pool them and score them. They need far
less memory than the map.

All ops have the same structure. A small op is one file, ``row_l2_loss.py``; a large one is a folder:

- ``attention_rows/op.py``: public function, checks, schema, autograd, and the list of backends;
- ``attention_rows/call.py``: the named tuple that carries the checked arguments;
- ``attention_rows/composite.py``: the op in plain torch, without a map;
- ``attention_rows/triton.py``, ``triton_backward.py``: the kernels; ``plan.py``: how they are launched;
- ``attention_rows/shared_query.py``: one gradient for the model's attention and the op.

``attention_entries/`` serves several functions with the same few kernels: columns, sums, statistics of heads,
and the gradient of a logsumexp.

``reference.py`` is the naive mathematics; every backend is tested against it. ``backends.py`` chooses the
backend of a call, ``launch.py`` is shared by all launches of Triton, ``native/`` builds, loads and
calls the compiled library, and ``resources`` states what every kernel costs.
"""

from . import reference
from .align_rows import align_rows
from .attention_entries import (
    HeadStatistics,
    attention_columns,
    attention_lse,
    attention_sums,
    head_statistics,
)
from .attention_rows import attention_rows
from .backends import BackendError, use_backend
from .diagonal_attention import diagonal_attention
from .flash_attention import flash_attention
from .layout import VideoTokens
from .motion_scores import MotionScores, motion_scores
from .motion_statistics import MotionStatistics
from .resample_rows import resample_rows
from .row_l2_loss import row_l2_loss
from .selection import select_heads, select_tokens
from .token_motion_scores import token_motion_scores

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "HeadStatistics",
    "MotionScores",
    "MotionStatistics",
    "VideoTokens",
    "align_rows",
    "attention_columns",
    "attention_lse",
    "attention_rows",
    "attention_sums",
    "diagonal_attention",
    "flash_attention",
    "head_statistics",
    "motion_scores",
    "reference",
    "resample_rows",
    "row_l2_loss",
    "select_heads",
    "select_tokens",
    "token_motion_scores",
    "use_backend",
]
