"""Alignment in TRL: `AlignedSFTTrainer` in place of `SFTTrainer`."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from .aligned_trainer import AlignedTrainer

__all__ = ["AlignedSFTTrainer"]


class AlignedSFTTrainer(AlignedTrainer, SFTTrainer):
    """`trl.SFTTrainer` with the alignment beside its loss.

    Args:
        model, args, data_collator, train_dataset, **kwargs: of `SFTTrainer`. The collator makes the batch
            from rows with `messages` (or `prompt` and `completion`) and their videos.
        prior_dir, aligner, row_of, video_root: of `AlignedTrainer`.
        alignment_weight, alignment_loss, ...: of `motionenhancer.alignment.trainer.MotionTrainer`.

    Raises:
        ValueError: see `AlignedTrainer`; no collator.
    """

    def __init__(self, model: Any, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        if data_collator is None:
            raise ValueError("data_collator: TRL has none for videos; give one, as in examples/align_trl.py")
        if args is not None:
            args.remove_unused_columns = False
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(model, args, data_collator, **kwargs)
