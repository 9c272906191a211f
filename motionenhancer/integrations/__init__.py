"""Alignment in other training loops: three framework-independent pieces, and plug-ins made from them.

`PriorLookup` gives the prior of a video, a question and an answer. `read_layout` gives the meaning of token
ids from any template. `AlignedCollator` adds the alignment to the batches of any collator. The plug-ins are
`trl.AlignedSFTTrainer`, `ms_swift.register` and `llamafactory.register`.
"""

from .aligned_collator import AlignedCollator
from .lookup import PriorLookup
from .token_layout import read_layout, video_grid

__all__ = ["AlignedCollator", "PriorLookup", "read_layout", "video_grid"]
