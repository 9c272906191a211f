"""Priors made during training: requested some batches ahead, and awaited when their batch is used.

Source of the priors: MotionEnhancer (CVPR 2026, arXiv 2606.06853). Making them during training is our own.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Any

import torch

from ..data import SkipLog
from ..priors.maker import PATIENCE, DeadTeacher, PriorMaker, RefusedClip, count_failed, count_made
from ..priors.prior import MotionPrior
from ..priors.requests import Made, PriorRequest
from .dataset import Alignment, PendingAlignment, Wanted

Batch = dict[str, Any]
Answers = dict[PriorRequest, Future[Made]]


class NoPriorError(ValueError):
    """The teacher failed on every clip, or on every clip after some point; the message says why."""


@dataclass
class OnlineCounts:
    """Counts of a process's priors over its training batches. A failed sample counts each time it is used.

    Attributes:
        busy_seconds: wall time that the teacher spent on finished priors.
        waited_seconds: wall time that the training waited for priors.
    """

    made: int = 0
    stored: int = 0
    failed: int = 0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def hidden_share(self) -> float | None:
        """Share of the teacher's time during which training did not wait; None if no prior was made."""
        if not self.busy_seconds:
            return None
        return min(1.0, max(0.0, 1.0 - self.waited_seconds / self.busy_seconds))

    def __add__(self, other: OnlineCounts) -> OnlineCounts:
        return OnlineCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class OnlinePriors:
    """Completes the alignment of batches with priors made during training: `MotionTrainer(online=...)`.

    Attributes:
        maker: makes the priors; `close` closes it.
        prefetch: number of steps for which priors are requested ahead; with 0, each step waits for them.
        grid: priors on another grid count as failed; None accepts any grid.
        patience: the run stops if the first `patience` clips all fail.
        settled: whether a prior was made already, as in a continued run; then failing clips do not stop it.
        counts, skips: of the batches yielded so far.
        described: sample id → its prior's description as JSON (see `MotionPrior.describe`).
        roundtrip: inversion error of the first clip, if the maker measures it.

    Raises:
        ValueError: prefetch below 0.
    """

    maker: PriorMaker
    prefetch: int = 1
    grid: tuple[int, int, int] | None = None
    patience: int = PATIENCE
    settled: bool = False
    counts: OnlineCounts = field(default_factory=OnlineCounts)
    skips: SkipLog = field(default_factory=SkipLog)
    described: dict[str, str] = field(default_factory=dict)
    roundtrip: dict[str, float] | None = None
    _feed: Generator[Batch] | None = None
    _batches: Iterator[Batch] | None = None
    _failures: dict[str, str] = field(default_factory=dict)
    _tried: int = 0
    _dead: str = ""

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise ValueError(f"--prior_prefetch must be at least 0, got {self.prefetch}")

    def feed(self, batches: Iterator[Batch], accumulation: int = 1) -> Iterator[Batch]:
        """Yield aligned batches, `accumulation` per step. A second call with an iterator continues it."""
        if self._feed is None or self._batches is not batches:
            self._drop()
            self._batches, self._feed = batches, self._aligned(batches, self.prefetch * accumulation)
        return self._feed

    def _aligned(self, batches: Iterator[Batch], depth: int) -> Generator[Batch]:
        """Yield batches in order, with the priors of `depth` later batches requested."""
        ahead: deque[tuple[Batch, Answers]] = deque()
        try:
            while True:
                for batch in islice(batches, depth + 1 - len(ahead)):
                    pending = batch.get("alignment")
                    ahead.append((batch, self.ask(pending) if isinstance(pending, PendingAlignment) else {}))
                if not ahead:
                    return
                batch, asked = ahead.popleft()
                if isinstance(batch.get("alignment"), PendingAlignment):
                    batch["alignment"] = self.complete(batch["alignment"], asked)
                yield batch
        finally:
            for _, asked in ahead:
                for answer in asked.values():
                    answer.cancel()

    def ask(self, pending: PendingAlignment) -> Answers:
        """Request all priors of a batch; samples of the same clip and text share one."""
        answers: Answers = {}
        for wanted in pending.wanted:
            if wanted is not None and wanted.request not in answers:
                answers[wanted.request] = self.maker.submit(wanted.request)
        return answers

    def complete(self, pending: PendingAlignment, answers: Answers | None = None) -> Alignment | None:
        """Wait for the priors of a batch and align it. A sample without a prior is not aligned."""
        if answers is None:
            answers = self.ask(pending)
        counted: set[PriorRequest] = set()
        priors: list[MotionPrior | None] = [None] * len(pending.wanted)
        for i, wanted in enumerate(pending.wanted):
            if wanted is not None:
                request = wanted.request
                priors[i] = self._await(wanted, answers[request], first=request not in counted)
                counted.add(request)
        return pending.complete(priors)

    def _await(self, wanted: Wanted, answer: Future[Made], *, first: bool) -> MotionPrior | None:
        began = perf_counter()
        try:
            found = answer.result()
            if self.grid is not None and found.prior.grid != self.grid:
                raise ValueError(f"its prior has grid {found.prior.grid}, the aligner has grid {self.grid}")
        except Exception as error:
            self._fail(wanted, error)
            return None
        finally:
            self.counts.waited_seconds += perf_counter() - began
        if first:
            self.counts.made += found.fresh
            self.counts.stored += not found.fresh
            self.counts.busy_seconds += found.seconds
            count_made(wanted.sample, found, self.skips)
        if found.roundtrip is not None:
            self.roundtrip = self.roundtrip or found.roundtrip
        if wanted.sample.id not in self.described:
            self.described[wanted.sample.id] = json.dumps(found.describe(*wanted))
        return found.prior

    def _fail(self, wanted: Wanted, error: Exception) -> None:
        self.counts.failed += 1
        self._tried += not isinstance(error, RefusedClip)
        if isinstance(error, DeadTeacher):
            self._dead = str(error)
        sample = wanted.sample
        if sample.id not in self._failures:
            self._failures[sample.id] = str(error) or type(error).__name__
            count_failed(sample, error, self.skips)

    def judge(self, total: Callable[[torch.Tensor], torch.Tensor], *, final: bool = False) -> None:
        """Stop a run whose teacher always fails. Every process must call it at the same steps.

        Args:
            total: sums a tensor over all processes.
            final: whether no more priors are needed. A teacher that died earlier then raises no error.

        Raises:
            NoPriorError: no process made a prior, and `patience` clips failed (at the end: any clip); or a
                teacher counts as dead (see `Patience`).
        """
        read = self.counts.made + self.counts.stored
        failures = self.counts.failed if final else self._tried
        sums = total(torch.tensor([float(read), float(failures), float(bool(self._dead))]))
        self.settled = self.settled or bool(sums[0] > 0)
        failed = int(sums[1])
        if self.settled or failed < (1 if final else self.patience):
            if sums[2] > 0 and not final:
                raise NoPriorError(
                    f"{self._dead or 'the teacher of another process fails on one clip after another'}. "
                    "The run stops, because no more samples would be aligned. The same command continues "
                    "from the newest checkpoint"
                )
            return
        reason = next((f"{k}: {v}" for k, v in self._failures.items()), "on other processes")
        raise NoPriorError(
            f"the teacher failed on all {failed} clips, so no sample would be aligned; for plain "
            f"fine-tuning use --alignment_weight 0. The first failure: {reason}"
        )

    def close(self) -> None:
        """Close the maker."""
        self._drop()
        self.maker.close()

    def _drop(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None
