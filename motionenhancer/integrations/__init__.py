"""Alignment in other people's training loops: three pieces that know no framework, and plug-ins made of them.

`PriorLookup` gives the prior of a video, a question and an answer. `read_layout` says what token ids that
anyone made stand for. `AlignedCollator` adds the alignment to the batches of any collator. The plug-ins are
`trl.AlignedSFTTrainer`, `ms_swift.register` and `llamafactory.register`.
"""

from .aligned_collator import AlignedCollator
from .lookup import PriorLookup
from .token_layout import read_layout, video_grid

__all__ = ["AlignedCollator", "PriorLookup", "read_layout", "video_grid"]
