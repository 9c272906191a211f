"""Additional log entries of a training run: both losses, λ, mapped words, confidence, time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Seconds spent inside `with stopwatch:`. It may be entered many times, but never nested.

    On a CUDA device the stream's time is measured, and nothing waits for the device before `seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = self._total = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._total += time.perf_counter() - self._began

    def seconds(self) -> float:
        """The seconds measured since the last call of `seconds`."""
        total, self._total = self._total, 0.0
        for begin, end in self._events:
            end.synchronize()
            total += begin.elapsed_time(end) / 1000
        self._events.clear()
        return total


class EvaluationLog:
    """Sums over the batches of one evaluation, on one process.

    Args:
        device: device of the losses.
        counted: only the first `counted` batches count; None: all batches.
    """

    def __init__(self, device: torch.device, counted: int | None = None) -> None:
        self._left, self._weight = counted, 0.0
        self._sums = torch.zeros(5, device=device)

    def add(
        self,
        model_loss: torch.Tensor,
        tokens: torch.Tensor | int,
        alignment_losses: torch.Tensor | None,
        aligned: int,
        weight: float,
    ) -> None:
        """Add a batch.

        Args:
            model_loss: a scalar, the mean over `tokens`.
            alignment_losses: as `StepLog.add_losses` takes them, means over `aligned` samples.
            weight: λ.
        """
        self._weight = weight
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                return
        self._sums[0] += model_loss.detach() * tokens
        self._sums[1] += tokens
        if alignment_losses is not None:
            self._sums[2:4] += alignment_losses.detach() * aligned
            self._sums[4] += aligned

    def entries(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`loss_ar`, the mean over all answer tokens, and `loss`, the sum of both terms.

        If any sample was aligned, also `loss_align` and `loss_align_raw`, means over the aligned samples.
        """
        losses, tokens, align, raw, aligned = total(self._sums).tolist()
        if not tokens:
            return {}
        found = {"loss": losses / tokens, "loss_ar": losses / tokens}
        if aligned:
            found |= {"loss_align": align / aligned, "loss_align_raw": raw / aligned}
            found["loss"] += self._weight * found["loss_align"]
        return found


class StepLog:
    """Sums over the micro-batches between two log lines, on one process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stopwatch = Stopwatch(device)
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self._losses = torch.zeros(3, device=self.device)
        self._counts = dict.fromkeys(("aligned", "priors", "confidence", "words", "mapped"), 0.0)

    def add_losses(self, model_loss: torch.Tensor, alignment_losses: torch.Tensor | None) -> None:
        """Add the terms of one micro-batch, each as a share of the step's term.

        Args:
            model_loss: a scalar.
            alignment_losses: (2,), with the aligner and without it; None if nothing was aligned.
        """
        self._losses[0] += model_loss.detach()
        if alignment_losses is not None:
            self._losses[1:] += alignment_losses.detach()
            self._counts["aligned"] += 1

    def add_batch(self, alignment: Any) -> None:
        """Add the words and confidences of one micro-batch's `dataset.Alignment`."""
        sure = [prior.confidence["confidence"] for prior in alignment.priors if prior is not None]
        self._counts["priors"] += len(sure)
        self._counts["confidence"] += sum(sure)
        self._counts["words"] += alignment.words
        self._counts["mapped"] += alignment.mapped

    def entries(self, total: Callable[[torch.Tensor], torch.Tensor], processes: int) -> dict[str, float]:
        """Return what to log, averaged over the steps since the last call, and start again at zero.

        Returns:
            `loss_ar`; and if any sample was aligned, `loss_align`, `loss_align_raw` (the distance without the
            aligner, of the student itself), `words_mapped` (share of the priors' words found among the
            student's tokens), `confidence` (mean over priors) and `alignment_seconds` (per step, of the
            forward).
        """
        if not self.steps:
            return {}
        own = torch.tensor([*self._counts.values(), self.stopwatch.seconds()], device=self.device)
        summed = total(torch.cat([self._losses, own])).tolist()
        losses, seconds = [value / self.steps / processes for value in summed[:3]], summed[-1]
        counts = dict(zip(self._counts, summed[3:-1], strict=True))
        logs = {"loss_ar": losses[0]}
        if counts["aligned"]:
            logs["loss_align"], logs["loss_align_raw"] = losses[1:]
            logs["alignment_seconds"] = seconds / self.steps / processes
        if counts["words"]:
            logs["words_mapped"] = counts["mapped"] / counts["words"]
        if counts["priors"]:
            logs["confidence"] = counts["confidence"] / counts["priors"]
        self._clear()
        return logs
