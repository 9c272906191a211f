"""Losses on validation samples: exact means that do not depend on the number of processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from .dataset import MotionDataset
from .logs import EvaluationLog


class ValidatedTrainer(Trainer):
    """`transformers.Trainer` whose evaluations log both losses, `eval_loss_ar` and `eval_loss_align`.

    The batches of a `MotionDataset` do not depend on the number of processes. The Trainer distributes any
    other data set, and fills its last batches with samples that were evaluated already.
    """

    _evaluation: EvaluationLog | None = None
    _counted: int | None = None
    """Number of batches of this process that count; None: all."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, MotionDataset):
            self._counted = None
            return super().get_eval_dataloader(eval_dataset)
        size, processes = self.args.eval_batch_size, self.args.world_size
        numbers = list(range(len(dataset)))
        batches = [numbers[start : start + size] for start in range(0, len(dataset), size)]
        mine = batches[self.args.process_index :: processes]
        self._counted = len(mine)
        # A process with one batch less still takes part in the forward passes of the others.
        mine += batches[: math.ceil(len(batches) / processes) - len(mine)]
        return DataLoader(
            dataset,
            batch_sampler=mine,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._evaluation = EvaluationLog(self.args.device, self._counted)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        found = self._evaluation.entries(self.total_over_processes)
        named = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def total_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all processes."""
        if self.args.world_size == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), "sum")
