"""The Hugging Face Trainer with one more term in the loss.

Source: MotionEnhancer (arXiv 2606.06853), section on alignment: L = L_AR + λ·L_align.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..priors.prior import say_cut
from ..students.capture import capture_attention
from ..weights import check_moments, load_whole, refuse_weights, saving
from .aligner import NOT_FINITE, align
from .aligner_training import AlignerTraining
from .dataset import PendingAlignment
from .logs import StepLog
from .online import OnlinePriors
from .validation import ValidatedTrainer
from .weight import AlignmentSchedule


class _Check(NamedTuple):
    """A value of the current step that must be finite. The device is read once per step."""

    finite: torch.Tensor
    """() bool."""
    problem: str
    """Message if the value is not finite."""
    value: torch.Tensor | None
    """() value to print with the message."""
    ids: Sequence[str]
    """Ids of the samples."""


class MotionTrainer(ValidatedTrainer):
    """`transformers.Trainer` whose loss is the model's own plus λ times the alignment to a motion prior.

    A batch may hold one more entry, `alignment` (see `dataset.MotionCollator`), which the model does not see.
    With `alignment_weight=0` and `measure_alignment=False` every step is the plain
    Trainer's.

    Both terms are means over the global batch: the model's loss over answer tokens, the alignment over
    samples with a prior. The numbers of accumulation steps and processes change neither.

    The host waits for the device once per step, before the optimizer. There, all processes check the losses
    of all micro-batches, the gradient norm and the aligner's gradient norm together.

    Args:
        *args, **kwargs: the Trainer's.
        alignment_weight: λ, or an `AlignmentSchedule` of it.
        alignment_loss, normalize_rows, prior_temperature: `loss`, `normalize` and `temperature` of
            `aligner.align`.
        attention: options of `capture_attention`: which layers and heads are read.
        aligner: module applied to the student's maps, or None for the identity. Its own AdamW trains it, and
            it stays outside the model. Checkpoints for resuming hold it in a separate folder.
        confidence_gate: priors with less confidence than this get a proportionally smaller weight; 0: off.
        learning_rates: parameter name → peak learning rate of that parameter; None: the Trainer's rate.
        measure_alignment: log `loss_align` also when λ is 0.
        online: makes missing priors ahead, while earlier batches are trained.

    Raises:
        ValueError: fp16 under DeepSpeed with a trainable aligner, whose gradients would stay scaled; a
            DeepSpeed config that defines an optimizer or scheduler.
        FloatingPointError: from `train`, when the loss or the gradient is NaN or infinite; names the samples.
    """

    _checks: tuple[_Check, ...] = ()
    """Checks of the current step."""
    _norm: torch.Tensor | None = None
    """Gradient norm of the current step."""

    def __init__(
        self,
        *args: Any,
        alignment_weight: float | AlignmentSchedule = 1.0,
        alignment_loss: str = "l2",
        normalize_rows: bool = True,
        attention: Mapping[str, Any] | None = None,
        aligner: nn.Module | None = None,
        prior_temperature: float = 1.0,
        confidence_gate: float = 0.0,
        learning_rates: Callable[[str], float | None] = lambda name: None,
        measure_alignment: bool = False,
        online: OnlinePriors | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        self._use_cache = {k: v for k, v in _settings(model).items() if k == "use_cache"}
        super().__init__(*args, **kwargs)
        # A non-finite loss stops the run. The Trainer's filter for such losses would wait for the device.
        self.args.logging_nan_inf_filter = False
        if not isinstance(alignment_weight, AlignmentSchedule):
            alignment_weight = AlignmentSchedule(alignment_weight)
        self.alignment_schedule = alignment_weight
        self.alignment_loss = alignment_loss
        self.normalize_rows = normalize_rows
        self.attention = dict(attention or {})
        self.prior_temperature = prior_temperature
        self.confidence_gate = confidence_gate
        self.learning_rates = learning_rates
        self.measure_alignment = measure_alignment
        self.online = online
        self.aligner = aligner.to(self.args.device) if aligner is not None else None
        self._aligner_training: AlignerTraining | None = None
        self._aligner_steps = True
        if self.is_deepspeed_enabled:
            refuse_deepspeed_sections(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if self.aligner is not None and any(p.requires_grad for p in self.aligner.parameters()):
            if self.is_deepspeed_enabled and self.args.fp16:
                raise ValueError("fp16 under DeepSpeed works with --aligner identity only; use bf16")
            self._aligner_training = AlignerTraining(self.aligner, self.args)
        self._log = StepLog(self.args.device)
        #: of the global batch: samples with an alignment, and tokens that count
        self._step_totals: torch.Tensor | None = None
        self._step_ids: list[str] = []
        #: sample id → why it could not be read and another took its place
        self.skipped: dict[str, str] = {}
        #: of all training batches this process saw
        names = ("samples", "aligned_samples", "words", "mapped_words", "cut_texts", "cut_words")
        self.counts = dict.fromkeys(names, 0)
        self.add_callback(_StepEnd(self))

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Also count aligned samples and tokens over all micro-batches and processes."""
        if self.online is not None:
            epoch_iterator = self.online.feed(epoch_iterator, num_batches)
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        totals[0] += sum(b["alignment"].count for b in batches if b.get("alignment") is not None)
        for batch in batches:
            totals[1] += _counting_tokens(batch)
        self._step_totals = self.total_over_processes(totals)
        self._step_ids = [sample for b in batches for sample in b.get("ids", [])]
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        alignment = inputs.pop("alignment", None)
        if isinstance(alignment, PendingAlignment):
            if self.online is None:
                raise ValueError("the batch requests priors: give MotionTrainer the argument online")
            alignment = self.online.complete(alignment)
        ids = inputs.pop("ids", [])
        self.skipped.update(inputs.pop("skipped", {}))
        if model.training:
            self._count(ids, alignment)
        tokens = _counting_tokens(inputs)
        weight = self.alignment_weight
        reads = alignment is not None and alignment.count > 0 and (weight != 0 or self.measure_alignment)
        aligned, where = None, cast(Any, nullcontext())
        if reads:
            where = capture_attention(model, alignment.rows, alignment.columns, **self.attention)
        with where as captured:
            # Only if the outputs are wanted: some trainers run the model a second time for them.
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        self._expect_finite(ids, loss, "the model's loss is", show=True)
        if reads:
            self._expect_finite(ids, captured.attention, f"alignment failed: {NOT_FINITE}")
            try:
                aligned = self._align(captured, alignment, weight)
            except ValueError as error:
                self._expect_finite(ids, torch.tensor(torch.nan), f"alignment failed: {error}")
            else:
                self._expect_finite(ids, aligned[0], "the alignment loss is", show=True)
        if not model.training or self._changes_in_backward():
            self._refuse_losses(everywhere=model.training)
        if model.training:
            divided = self._divided_by_accumulation(num_items_in_batch)
            parts = self.current_gradient_accumulation_steps if divided else 1
            if divided:
                loss = self._share_of(loss, tokens, which=1, parts=parts)
            if aligned is not None:
                aligned = self._share_of(aligned, alignment.count, which=0, parts=parts)
            self._log.add_losses(loss / parts, None if aligned is None else aligned / parts)
        elif self._evaluation is not None:
            self._evaluation.add(loss, tokens, aligned, alignment.count if reads else 0, weight)
        if aligned is not None and weight != 0:
            loss = loss + weight * aligned[0]
        return (loss, outputs) if return_outputs else loss

    @property
    def alignment_weight(self) -> float:
        """λ in force at the current step."""
        return self.alignment_schedule.at(self.state.global_step, self.state.max_steps)

    def _align(self, captured: Any, alignment: Any, weight: float) -> torch.Tensor:
        """Return (2,) distances: the trained one, and the one without the aligner, which is only logged."""
        gates = None
        if self.confidence_gate:
            sure = [1.0 if p is None else p.confidence["confidence"] for p in alignment.priors]
            gates = [min(1.0, confidence / self.confidence_gate) for confidence in sure]
        distance = functools.partial(
            align,
            captured,
            alignment.priors,
            grid=alignment.grids,
            row_tokens=alignment.row_tokens,
            loss=self.alignment_loss,
            weights=gates,
            temperature=self.prior_temperature,
            normalize=self.normalize_rows,
            check_finite=False,
        )
        with self._log.stopwatch, torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            trained = distance(aligner=self.aligner)
            plain = self.aligner is None or isinstance(self.aligner, nn.Identity)
            with torch.no_grad():
                raw = trained.detach() if plain else distance()
            return torch.stack([trained, raw])

    def _count(self, ids: Sequence[str], alignment: Any) -> None:
        self.counts["samples"] += len(ids)
        if alignment is not None:
            self.counts["aligned_samples"] += alignment.count
            self.counts["words"] += alignment.words
            self.counts["mapped_words"] += alignment.mapped
            cut = [p for p in alignment.priors if p is not None and p.truncated > 0]
            self.counts["cut_texts"] += len(cut)
            self.counts["cut_words"] += sum(p.cut_words for p in cut)
            self._log.add_batch(alignment)

    def _divided_by_accumulation(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer divides the returned loss by the accumulation steps; families differ."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None
        return not scaled

    def _share_of(
        self, mean: torch.Tensor, count: torch.Tensor | int, *, which: int, parts: int
    ) -> torch.Tensor:
        """Turn the mean of this micro-batch over `count` into its share of the mean of the global batch.

        Engines average gradients over processes, and the Trainer divides by the `parts` of accumulation.
        """
        if self._step_totals is None or self.current_gradient_accumulation_steps * self.args.world_size == 1:
            return mean
        return mean * (count * parts * self.args.world_size / self._step_totals[which].clamp(min=1))

    def summary(self) -> str:
        """Return one line with the totals of the alignment. Every process must call it."""
        counts = torch.tensor(list(self.counts.values()))
        samples, aligned, words, found, *cut = self.total_over_processes(counts).tolist()
        return f"{aligned} of {samples} samples aligned, {found} of {words} words found, {say_cut(*cut)}"

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed at its end: the Trainer would take one more step before it checks.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- stopping at non-finite numbers ----

    def _expect_finite(
        self, ids: Sequence[str], value: torch.Tensor, problem: str, *, show: bool = False
    ) -> None:
        """Register a value of these samples, to be checked with the other values of the step."""
        value = value.detach()
        finite = value.isfinite().all().to(self.args.device, non_blocking=value.device.type == "cpu")
        self._checks = (*self._checks, _Check(finite, problem, value.mean() if show else None, ids))

    def _changes_in_backward(self) -> bool:
        """Whether the backward pass changes weights, as with DeepSpeed or a layerwise optimizer."""
        if self.is_deepspeed_enabled:
            return self.accelerator.sync_gradients
        return any(kind in self.args.optim for kind in ("lomo", "layerwise"))

    def _refuse_losses(self, *, everywhere: bool = True, others: Sequence[torch.Tensor] = ()) -> list[float]:
        """Raise in all processes if one has a non-finite number, since the others would wait for it.

        Args:
            everywhere: whether all processes call this, to stop together.
            others: () bool that is read in the same transfer.

        Returns:
            ``others``, 1 or 0.

        Raises:
            FloatingPointError: names the first non-finite number of each process, and its samples.
        """
        checks, self._checks = self._checks, ()
        flags = [check.finite for check in checks] + list(others)
        bad = sum((~flag for flag in flags[: len(checks)]), torch.zeros_like(flags[0], dtype=torch.float32))
        if everywhere:
            bad = self.total_over_processes(bad)
        count, *finite = torch.stack([bad, *[flag.to(bad) for flag in flags]]).tolist()
        if count:
            # Only the first: later ones in the step are its consequences.
            wrong = [check for check, good in zip(checks, finite, strict=False) if not good][:1]
            found = [self._stated(*check[1:]) for check in wrong]
            if everywhere and self.args.world_size > 1:
                found = gather_object(found)
            raise FloatingPointError("; ".join(found))
        return finite[len(checks) :]

    def _stated(self, problem: str, value: torch.Tensor | None, ids: Sequence[str]) -> str:
        said = problem if value is None else f"{problem} {float(value)}"
        return f"{said} at step {self.state.global_step}; samples {list(ids)}"

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._norm = None if whole is None else torch.as_tensor(whole, device=self.args.device)
        return norm

    def finish_aligner_gradients(self) -> None:
        """Finish the aligner's gradients; raise before the optimizers if a number is not finite.

        Raises:
            FloatingPointError: a loss, or the norm of the model's or the aligner's gradient, is not finite.
        """
        norms = {} if self._norm is None else {"the gradient's norm is": self._norm}
        if self._aligner_training is not None:
            scaler = getattr(self.accelerator, "scaler", None)
            norms["the norm of the aligner's gradient is"] = self._aligner_training.finish_gradients(
                self.args.world_size, 1.0 if scaler is None else scaler.get_scale(), self.args.max_grad_norm
            )
        finite = self._refuse_losses(others=[norm.isfinite().all() for norm in norms.values()])
        if self.args.fp16:
            # A scaler of half precision meets infinite gradients in the ordinary course and skips the step.
            # It sees the model's alone and would let the aligner take this one.
            self._aligner_steps = all(finite[-1:])
        else:
            for named, good in zip(norms.items(), finite, strict=True):
                if not good:
                    # The norm is the same in all processes.
                    ids = gather_object(self._step_ids) if self.args.world_size > 1 else self._step_ids
                    raise FloatingPointError(self._stated(*named, ids))
            self._aligner_steps = True

    def step_aligner(self) -> None:
        """Step the aligner, unless the model's optimizer skipped the step."""
        skipped = self.accelerator.optimizer_step_was_skipped or not self._aligner_steps
        if self._aligner_training is not None and not skipped:
            self._aligner_training.step(self._rate_share())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._log.entries(self.total_over_processes, self.args.world_size)
            if "loss_align" in logs:
                last = max(0, self.state.global_step - 1)
                logs["lambda"] = self.alignment_schedule.at(last, self.state.max_steps)
        super().log(logs, start_time)

    # ---- the optimizers ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            self._split_groups(optimizer)
        return optimizer

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Move parameters with their own learning rate into separate groups."""
        assert self.model is not None
        own = {id(p): self.learning_rates(name) for name, p in self.model.named_parameters()}
        for group in list(optimizer.param_groups):
            for rate in sorted({r for r in (own[id(p)] for p in group["params"]) if r is not None}):
                chosen = [p for p in group["params"] if own[id(p)] == rate]
                group["params"] = [p for p in group["params"] if own[id(p)] != rate]
                options = {k: v for k, v in group.items() if k not in ("params", "lr")}
                optimizer.add_param_group({**options, "params": chosen, "lr": rate})
        # DeepSpeed flattens every group, and cannot flatten an empty one.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def _rate_share(self) -> float:
        """The current learning rate divided by its peak, the same for all groups."""
        assert self.optimizer is not None
        group = self.optimizer.param_groups[0]
        peak = group.get("initial_lr") or group["lr"]
        return float(group["lr"]) / float(peak) if peak else 0.0

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        settings = _settings(self.model)
        # The Trainer sets use_cache to false for training; a loaded checkpoint must generate with the cache.
        while_training = settings.pop("use_cache", False)
        settings.update(self._use_cache)
        try:
            super()._save(output_dir, state_dict)
        finally:
            settings["use_cache"] = while_training
        # The Trainer pickles its arguments beside the weights; a checkpoint has only the family's files.
        if self.args.should_save:
            (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        refuse_weights([self.model, self.aligner], self.state.global_step, self.args.world_size)
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        with saving(folder):
            # Before the Trainer's own files: the last of those marks the checkpoint as whole.
            if self._aligner_training is not None and self.args.should_save:
                self._aligner_training.save(folder)
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        whole = any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(target, PreTrainedModel) and whole and not sharded:
            # save_pretrained writes the hub's names of weights, which the Trainer's own loader does not know:
            # it would warn and go on from the weights it started with.
            saved = load_whole(type(target), folder, dtype=target.dtype)
            target.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        if self._aligner_training is not None:
            self._aligner_training.load(Path(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_moments(self.optimizer, checkpoint)
            if self._aligner_training is not None:
                self._aligner_training.load(Path(checkpoint))


def refuse_deepspeed_sections(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config that defines its own optimizer or scheduler.

    Raises:
        ValueError: the config has one; DeepSpeed would silently drop our groups with other learning rates.
    """
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f'the DeepSpeed config must have no "{section}" section, which would replace the learning '
                "rates of the vision tower and the aligner: remove the section, and give --learning_rate, "
                "--weight_decay, --lr_scheduler_type and --warmup_steps"
            )


def _settings(model: Any) -> dict[str, Any]:
    """The attributes of the configuration itself."""
    config = getattr(model, "config", None)
    return {} if config is None else vars(config)


def _counting_tokens(batch: dict[str, Any]) -> torch.Tensor | int:
    """Count the answer tokens in a batch's loss. The first token of a sequence is not predicted."""
    labels = batch.get("labels")
    return 0 if labels is None else (labels[..., 1:] != -100).sum()


class _StepEnd(TrainerCallback):
    """Steps the aligner with the model, because the Trainer does not know the aligner."""

    def __init__(self, trainer: MotionTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.finish_aligner_gradients()
        if trainer.online is not None:
            trainer.online.judge(trainer.total_over_processes)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.step_aligner()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._log.steps += 1
        if self.trainer._aligner_training is not None:
            self.trainer._aligner_training.clear()
