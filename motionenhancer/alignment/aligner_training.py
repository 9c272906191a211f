"""Trains the aligner beside the model and keeps it out of the model's files.

The aligner has its own optimizer, because FSDP2 and DeepSpeed handle only the model's parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import nn

from ..weights import check_moments

#: Folder of a checkpoint to resume from. Loaders of models read every *.safetensors beside the weights.
FOLDER = "motion_aligner"
_WEIGHTS, _OPTIMIZER = "aligner.safetensors", "optimizer.safetensors"


class AlignerTraining:
    """An aligner with AdamW, stepped along with the model's optimizer.

    Args:
        module: the aligner; some of its parameters require gradients.
        settings: TrainingArguments. The Adam constants are used; weight decay is not.
    """

    def __init__(self, module: nn.Module, settings: Any) -> None:
        self.module, self._rate = module, settings.learning_rate
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=0.0,
            # An aligner for a large grid has millions of weights: one pass over them instead of ten.
            fused=self._parameters[0].device.type in ("cpu", "cuda"),
        )

    def finish_gradients(
        self, processes: int, loss_scale: float = 1.0, max_norm: float = 0.0
    ) -> torch.Tensor:
        """Average the accumulated gradients over processes, undo a scaler's factor, and clip them.

        They are clipped separately, because engines clip the model's gradients without access to these. A
        `max_norm` of 0 does not clip.

        Returns:
            The norm before clipping, the same in every process, () float32.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                # Every process takes part, whether its own samples had a prior or not.
                parameter.grad = torch.zeros_like(parameter)
            if processes > 1:
                torch.distributed.all_reduce(parameter.grad)
            if processes > 1 or loss_scale != 1.0:
                parameter.grad /= processes * loss_scale
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm if max_norm > 0 else float("inf"))

    def step(self, share: float) -> None:
        """One step of AdamW at `share` of the peak learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share
        self._optimizer.step()

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def save(self, checkpoint: Path) -> None:
        """Write weights and Adam moments into a checkpoint folder."""
        folder = checkpoint / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, folder / _WEIGHTS)
        moments = {
            f"{index}.{name}": torch.as_tensor(value).contiguous()
            for index, state in self._optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file(moments, folder / _OPTIMIZER)

    def load(self, checkpoint: Path) -> None:
        """Continue from the files that `save` wrote.

        Raises:
            ValueError: the checkpoint has no aligner, or a different one.
        """
        folder = checkpoint / FOLDER
        if not (folder / _OPTIMIZER).is_file():
            raise ValueError(f"{checkpoint}: this checkpoint has no aligner, but the run trains one")
        try:
            self.module.load_state_dict(load_file(folder / _WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"{folder}: not the aligner of this run: {error}") from error
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / _OPTIMIZER).items():
            index, _, field = name.partition(".")
            state.setdefault(int(index), {})[field] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        check_moments(self._optimizer, folder)
