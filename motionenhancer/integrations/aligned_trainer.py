"""What the plug-ins have in common: a mixin in front of a framework's own trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..alignment.aligner import build_aligner
from ..alignment.trainer import MotionTrainer
from .aligned_collator import AlignedCollator
from .lookup import PriorLookup

#: Where a plug-in keeps the row of a data file that a feature was made of.
ROW = "motion_row"
_OTHER_LOSS = re.compile("PO|KTO|RLOO|GKD|GOLD|SDFT|OPD|BCO|NashMD|PRM|Reward|Reranker|Distil")


class AlignedTrainer(MotionTrainer):
    """`MotionTrainer` as a mixin: `class Mine(AlignedTrainer, SomeTrainer)` aligns with stored priors.

    Args:
        *args, **kwargs: of the framework's trainer, and of `MotionTrainer`.
        prior_dir: folder of priors that `python -m motionenhancer extract` made.
        aligner: "mlp", "identity", "pointwise" or "conv".
        student_processor: by default the trainer's `processing_class`.
        row_of: see `AlignedCollator`.
        video_root: folder that the rows' videos are relative to.

    Raises:
        ValueError: a trainer of another loss than the supervised one; no prior in the folder.
    """

    def __init__(
        self,
        *args: Any,
        prior_dir: str | Path,
        aligner: str = "mlp",
        student_processor: Any = None,
        row_of: Callable[[Any], Mapping[str, Any] | None] | None = None,
        video_root: str | Path = ".",
        **kwargs: Any,
    ) -> None:
        for base in type(self).__mro__:
            if _OTHER_LOSS.search(base.__name__):
                raise ValueError(
                    f"{base.__name__}: alignment works with supervised fine-tuning only; train with the "
                    "supervised trainer first, or without the plug-in"
                )
        priors = PriorLookup(prior_dir, grid=aligner != "identity")
        settings: Any = kwargs.get("args", args[1] if len(args) > 1 else None)
        if getattr(settings, "gradient_checkpointing", False):
            # Re-entrant checkpointing drops the alignment's gradient, and some frameworks fall back to it.
            # Newer versions of transformers read the second name.
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                if hasattr(settings, name):
                    setattr(settings, name, {"use_reentrant": False, **(getattr(settings, name) or {})})
        seed = getattr(settings, "seed", 0)
        made = None if priors.grid is None else build_aligner(aligner, priors.grid, seed=seed)
        super().__init__(*args, aligner=made, **kwargs)
        self.args.remove_unused_columns = False
        processor = student_processor if student_processor is not None else self.processing_class
        if not hasattr(processor, "video_processor"):
            raise ValueError(
                f"processing_class must be the student's processor, which takes videos, got "
                f"{type(processor).__name__}"
            )
        collate = self.data_collator
        self.data_collator = AlignedCollator(collate, priors, processor, row_of=row_of, root=video_root)
        self.add_callback(_Summary(self))
        if self.is_world_process_zero():
            print(f"priors of {priors.teacher} from {prior_dir}, made from the {priors.source} text")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `MotionTrainer`.

        Raises:
            ValueError: a batch without labels.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"{type(self).__name__}: alignment works with supervised fine-tuning only, whose batches "
                f"have labels; this batch has {', '.join(inputs)}"
            )
        return super().compute_loss(model, inputs, *args, **kwargs)


def take_row(feature: Any) -> Mapping[str, Any] | None:
    """Take out of a feature the row that a plug-in put there, as a dictionary or as json."""
    row = feature.pop(ROW, None)
    return json.loads(row) if isinstance(row, str) else row


class _Summary(TrainerCallback):
    def __init__(self, trainer: MotionTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        said = self.trainer.summary()
        if self.trainer.is_world_process_zero():
            print(said)
