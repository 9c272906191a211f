"""The prior of a video, a question and an answer, from a store that knows how it was made."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import Clip, Sample
from ..data.digests import DigestCache
from ..priors.extraction import EXTRACTION, read_extraction
from ..priors.prior import MotionPrior

#: Number of first samples without any prior that counts as a mistake of the settings.
PATIENCE = 32
#: Number of reasons why a sample has no prior that are printed.
SHOWN = 3

logger = logging.getLogger("motionenhancer")


class PriorLookup:
    """Stored priors as a function of video, question and answer.

    Teachers, settings and the text that they were given are those of the newest run that made priors. Priors
    of several teachers are combined, with its weights and on its grid.

    Args:
        folder: the `--prior_dir` of `python -m motionenhancer extract` or `train`.
        grid: (F, H, W) that a prior must have; None takes any. `grid=True` takes that of the first prior.

    Attributes:
        teacher: path of the teacher that made the priors; of several, with + between them.
        source: the text it was given: "both", "question" or "answer".
        grid: the grid that is asked for, or None.
        missing: reason → number of samples without a prior.
        found: number of samples with one.

    Raises:
        ValueError: the folder holds no extraction, or no prior.

    Example:
        >>> lookup = PriorLookup("runs/priors")  # doctest: +SKIP
        >>> prior = lookup("clip.mp4", "What moves?", "The red ball.")  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, grid: tuple[int, int, int] | bool | None = None) -> None:
        try:
            self._stored = read_extraction(folder)
        except FileNotFoundError:
            raise ValueError(
                f"prior_dir {folder}: holds no {EXTRACTION}; make the priors with "
                "python -m motionenhancer extract --prior_dir and the options of your data and teacher"
            ) from None
        self.store, self.source = self._stored.store, self._stored.source
        self.teacher = " + ".join(self._stored.teachers)
        first = next(iter(self.store), None)
        if first is None:
            raise ValueError(f"prior_dir {folder}: holds no prior; run the extraction to its end")
        if grid is True:
            grid = self.store.grid or self.store.read(first).grid
        self.grid: tuple[int, int, int] | None = grid or None
        self.found, self.missing = 0, Counter[str]()

    def __call__(self, video: str | Path | Clip, question: str, answer: str) -> MotionPrior | None:
        """The prior of one question about a video and its answer, or None; see `of`."""
        asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        place = video if isinstance(video, Clip) else Path(video)
        return self.of(Sample(str(video), [asked, reply], (place,)))

    def of(self, sample: Sample) -> MotionPrior | None:
        """The prior of a conversation about one video, or None; `missing` counts why.

        Raises:
            ValueError: none of the first 32 samples has a prior. The message says what was looked for.
        """
        try:
            prior = self._stored.read(self._stored.keys(sample, self._digests.digest))
            if self.grid is not None and prior.grid != self.grid:
                raise ValueError(f"its prior has grid {prior.grid}, the aligner has grid {self.grid}")
        except (ValueError, OSError) as error:
            self.leave_out(str(error), sample.id)
        except KeyError:
            self.leave_out("no such prior in the store", sample.id)
        else:
            self.found += 1
            return prior
        return None

    def leave_out(self, reason: str, name: str) -> None:
        """Count a sample without a prior, and print the first reasons.

        Raises:
            ValueError: see `of`.
        """
        self.missing[reason] += 1
        if self.missing[reason] == 1 and len(self.missing) <= SHOWN:
            logger.warning("%s is trained on without alignment: %s", name, reason)
        if not self.found and self.missing.total() >= PATIENCE:
            raise ValueError(
                f"none of the first {PATIENCE} samples has a prior in {self.store.folder} (teacher "
                f"{self.teacher}, --prompt_source {self.source}); the last is {name}: {reason}. Extract "
                "priors from the same videos and conversations"
            )

    @cached_property
    def _digests(self) -> DigestCache:
        return DigestCache(self.store.folder, writes=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled: each worker of a data loader opens its own."""
        return {name: value for name, value in vars(self).items() if name != "_digests"}
