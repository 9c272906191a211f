"""Alignment in LLaMA-Factory: `register` before `run_exp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamafactory.data import loader
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from .aligned_trainer import ROW, AlignedTrainer, take_row

__all__ = ["register"]


def register(prior_dir: str | Path, **options: Any) -> None:
    """Make LLaMA-Factory's supervised fine-tuning align with the priors of a folder.

    Options are those of `AlignedTrainer` and `MotionTrainer`, such as `alignment_weight`. Another stage than
    `sft` raises a ValueError before the model is loaded.
    """

    class AlignedFactoryTrainer(AlignedTrainer, CustomSeq2SeqTrainer):
        def __init__(self, **kwargs: Any) -> None:
            given = {"student_processor": kwargs["processor"], "prior_dir": prior_dir, "row_of": take_row}
            super().__init__(**kwargs, **given, **options)

    found = tuner.get_train_args

    def get_train_args(args: Any = None) -> Any:
        parsed = found(args)
        model, data, _, tuning, _ = parsed
        # Re-entrant checkpointing, the default, drops the alignment's gradient.
        model.use_reentrant_gc = False
        wrong = {name: getattr(tuning, name, None) for name in ("use_hyper_parallel", "use_mca")}
        wrong |= {name: getattr(data, name) for name in ("packing", "neat_packing", "tokenized_path")}
        if tuning.stage != "sft":
            raise ValueError(f"stage {tuning.stage}: alignment works with sft only; remove the plug-in")
        if any(wrong.values()):
            raise ValueError(f"alignment does not work with {', '.join(n for n, v in wrong.items() if v)}")
        return parsed

    tuner.get_train_args = get_train_args
    workflow.CustomSeq2SeqTrainer = AlignedFactoryTrainer
    loader.SupervisedDatasetProcessor = RowsKept


class RowsKept(SupervisedDatasetProcessor):
    """Keeps beside the tokens of each sample the row from which they were made."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """See LLaMA-Factory's; one more column."""
        self.rows: list[str] = []
        return {**super().preprocess_dataset(examples), ROW: self.rows}

    def _encode_data_example(self, prompt: Any, response: Any, system: Any, *args: Any, **kwargs: Any) -> Any:
        media = {name: kwargs.get(name) or None for name in ("images", "videos")}
        row = {"messages": [*prompt, *response], "system": system or None, **media}
        self.rows.append(json.dumps(row, default=str))
        return super()._encode_data_example(prompt, response, system, *args, **kwargs)
