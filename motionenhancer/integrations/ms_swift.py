"""Alignment in ms-swift: a plug-in for `swift sft --external_plugins`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from swift.dataset import LazyLLMDataset
from swift.trainers import Seq2SeqTrainer, TrainerFactory

from .aligned_trainer import ROW, AlignedTrainer, take_row

__all__ = ["register"]


def register(prior_dir: str | Path, **options: Any) -> None:
    """Make `swift sft` align with the priors of a folder.

    Options are those of `AlignedTrainer` and `MotionTrainer`, such as `alignment_weight`. Another task or
    loss than `swift sft`'s raises a ValueError before the model is loaded.
    """

    class AlignedSwiftTrainer(AlignedTrainer, Seq2SeqTrainer):
        def __init__(self, *args: Any, template: Any, train_dataset: Any, **kwargs: Any) -> None:
            given = {"template": template, "student_processor": template.processor, "prior_dir": prior_dir}
            for dataset in (train_dataset, kwargs.get("eval_dataset")):
                _keep_rows(dataset)
            super().__init__(
                *args, train_dataset=train_dataset, row_of=take_row, **given, **options, **kwargs
            )

    found = TrainerFactory.get_cls

    def get_cls(args: Any, mapping: dict[str, str]) -> Any:
        loss = getattr(args, "rlhf_type", args.task_type)
        if loss != "causal_lm":
            raise ValueError(f"{loss}: alignment works with swift sft only; remove the plug-in")
        return AlignedSwiftTrainer if mapping is TrainerFactory.TRAINER_MAPPING else found(args, mapping)

    TrainerFactory.get_cls = staticmethod(get_cls)


def _keep_rows(dataset: Any) -> None:
    if dataset is None:
        return
    if not isinstance(dataset, LazyLLMDataset):
        raise ValueError(
            "alignment needs the rows that ms-swift encodes while it trains: leave out --packing, "
            "--streaming and --truncation_strategy split"
        )
    dataset.encode_func = partial(_encode, dataset.encode_func)


def _encode(encode: Callable[..., dict[str, Any]], row: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**encode(row, **options), ROW: row}
