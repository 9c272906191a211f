"""The Hugging Face Trainer with one more term in the loss.

Source: MotionEnhancer (arXiv 2606.06853), section on alignment: L = L_AR + λ·L_align.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .aligner import align
from .confidence import gate_weight
from .vlm.capture import capture_attention

_ALIGNER_FILE = "aligner.safetensors"


class MotionTrainer(Trainer):
    """`transformers.Trainer` whose loss is the model's own plus λ times the alignment to a motion prior.

    A batch may hold one more entry, `alignment` (see `dataset.MotionCollator`); it is taken out before the
    model sees the batch. With `alignment_weight=0` and `measure_alignment=False` every step is the plain
    Trainer's.

    Args:
        *args, **kwargs: the Trainer's.
        alignment_weight: λ.
        alignment_loss: "l2", "mse" or "kl".
        aligner: module applied to the student's maps, or None for the identity. It is trained along, kept
            outside the model and thrown away at the end; checkpoints for resuming hold it in a file of its
            own.
        confidence_gate: priors less confident than this are followed proportionally less; 0 is no gate.
        learning_rates: name of a parameter → its own peak learning rate; None leaves the Trainer's.
        measure_alignment: log `loss_align` also when λ is 0.

    Raises:
        FloatingPointError: from `train`, when the loss is NaN or infinite; names the samples.
    """

    def __init__(
        self,
        *args: Any,
        alignment_weight: float = 1.0,
        alignment_loss: str = "l2",
        aligner: nn.Module | None = None,
        confidence_gate: float = 0.0,
        learning_rates: Callable[[str], float | None] = lambda name: None,
        measure_alignment: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.alignment_weight = alignment_weight
        self.alignment_loss = alignment_loss
        self.confidence_gate = confidence_gate
        self.learning_rates = learning_rates
        self.measure_alignment = measure_alignment
        self.aligner = aligner.to(self.args.device) if aligner is not None else None
        self._terms: dict[str, torch.Tensor] = {}
        self._confidences: list[float] = []
        self._term_steps = 0
        self._aligned_in_step: torch.Tensor | None = None
        #: sample id → why it could not be read and another took its place
        self.skipped: dict[str, str] = {}
        #: of all training batches this process saw
        self.counts = {"samples": 0, "aligned_samples": 0, "words": 0, "mapped_words": 0}
        self.add_callback(_StepEnd(self))

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Also count the aligned samples of all micro-batches, so that accumulation changes nothing."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(b["alignment"].count for b in batches if b.get("alignment") is not None)
        aligned = torch.tensor(float(count), device=self.args.device)
        if self.args.world_size > 1:
            aligned = self.accelerator.reduce(aligned, "sum")
        self._aligned_in_step = aligned
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        alignment = inputs.pop("alignment", None)
        ids = inputs.pop("ids", [])
        self.skipped.update(inputs.pop("skipped", {}))
        if model.training:
            self._count(ids, alignment)
        reads = alignment is not None and alignment.count > 0
        if not reads or (self.alignment_weight == 0 and not self.measure_alignment):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._require_finite("the model's loss", loss, ids)
            self._record(model, num_items_in_batch, loss, None)
            return (loss, outputs) if return_outputs else loss

        with capture_attention(model, alignment.rows, alignment.columns) as captured:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._require_finite("the model's loss", loss, ids)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.alignment_weight != 0):
                aligned = align(
                    captured,
                    alignment.priors,
                    grid=alignment.grids,
                    row_tokens=alignment.row_tokens,
                    aligner=self.aligner,
                    loss=self.alignment_loss,
                    weights=self._weights(alignment.priors),
                )
        except ValueError as error:
            raise FloatingPointError(
                f"alignment failed at step {self.state.global_step}: {error}; samples {list(ids)}"
            ) from error
        aligned = aligned * self._share(model, alignment.count, num_items_in_batch)
        self._require_finite("the alignment loss", aligned, ids)
        self._record(model, num_items_in_batch, loss, aligned)
        if self.alignment_weight != 0:
            loss = loss + self.alignment_weight * aligned
        return (loss, outputs) if return_outputs else loss

    def _weights(self, priors: Sequence[Any]) -> list[float] | None:
        if not self.confidence_gate:
            return None
        sure = [1.0 if prior is None else prior.confidence["confidence"] for prior in priors]
        return [gate_weight(confidence, self.confidence_gate) for confidence in sure]

    def _count(self, ids: Sequence[str], alignment: Any) -> None:
        self.counts["samples"] += len(ids)
        if alignment is not None:
            self.counts["aligned_samples"] += alignment.count
            self.counts["words"] += alignment.words
            self.counts["mapped_words"] += alignment.mapped
            self._confidences += [p.confidence["confidence"] for p in alignment.priors if p is not None]

    def _divided_by_accumulation(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer will divide the returned loss by the accumulation steps; families differ."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None
        return not scaled

    def _share(self, model: nn.Module, count: int, num_items_in_batch: Any) -> Any:
        """Turns this micro-batch's mean over `count` samples into its share of the global batch's mean."""
        if not model.training or self._aligned_in_step is None:
            return 1.0
        accumulation = (
            self.current_gradient_accumulation_steps
            if self._divided_by_accumulation(num_items_in_batch)
            else 1
        )
        # Data-parallel engines average gradients over processes; the mean is over all their samples.
        return count * accumulation * self.args.world_size / self._aligned_in_step.clamp(min=1)

    def _require_finite(self, name: str, value: torch.Tensor, ids: Sequence[str]) -> None:
        if not torch.isfinite(value).all():
            raise FloatingPointError(
                f"{name} is {float(value.detach().mean())} at step {self.state.global_step}; "
                f"samples {list(ids)}"
            )

    def _record(
        self,
        model: nn.Module,
        num_items_in_batch: Any,
        loss: torch.Tensor,
        aligned: torch.Tensor | None,
    ) -> None:
        if not model.training:
            return
        parts = (
            self.current_gradient_accumulation_steps
            if self._divided_by_accumulation(num_items_in_batch)
            else 1
        )
        terms = {"loss_ar": loss, "loss_align": aligned}
        for name, value in terms.items():
            if value is not None:
                mean = value.detach().float().mean() / parts
                self._terms[name] = self._terms[name] + mean if name in self._terms else mean

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_steps:
            for name in ("loss_ar", "loss_align"):
                value = self._terms.get(name, torch.zeros((), device=self.args.device))
                if self.args.world_size > 1:
                    value = self.accelerator.reduce(value, "mean")
                if name in self._terms or name == "loss_ar":
                    logs[name] = float(value) / self._term_steps
            if self._confidences:
                logs["confidence"] = sum(self._confidences) / len(self._confidences)
            self._terms, self._confidences, self._term_steps = {}, [], 0
        super().log(logs, start_time)

    # ---- the aligner, trained along and left out of the model ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            self._split_groups(optimizer)
        if made and self.aligner is not None:
            parameters = [p for p in self.aligner.parameters() if p.requires_grad]
            if parameters:
                optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Move parameters with a learning rate of their own into groups of their own."""
        assert self.model is not None
        own = {id(p): self.learning_rates(name) for name, p in self.model.named_parameters()}
        for group in list(optimizer.param_groups):
            for rate in sorted({r for r in (own[id(p)] for p in group["params"]) if r is not None}):
                chosen = [p for p in group["params"] if own[id(p)] == rate]
                group["params"] = [p for p in group["params"] if own[id(p)] != rate]
                options = {k: v for k, v in group.items() if k not in ("params", "lr")}
                optimizer.add_param_group({**options, "params": chosen, "lr": rate})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.aligner is not None and self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self.aligner.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Before the Trainer's own files: the last of those marks the checkpoint as whole.
        if self.aligner is not None and self.aligner.state_dict() and self.args.should_save:
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.aligner.state_dict(), folder / _ALIGNER_FILE)
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        whole = any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(target, PreTrainedModel) and whole and not sharded:
            # save_pretrained writes the hub's names of weights, which the Trainer's own loader does not know:
            # it would warn and go on from the weights it started with.
            saved = type(target).from_pretrained(folder, dtype=target.dtype, local_files_only=True)
            target.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = folder / _ALIGNER_FILE
        if self.aligner is not None and file.is_file():
            self.aligner.load_state_dict(load_file(file))


class _StepEnd(TrainerCallback):
    """The Trainer clears the model's gradients after a step and knows nothing of the aligner's."""

    def __init__(self, trainer: MotionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._term_steps += 1
        if self.trainer.aligner is not None:
            self.trainer.aligner.zero_grad(set_to_none=True)
