"""The prior of a video, a question and an answer, from a store that knows how it was made."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import Clip, Sample, prompt_text
from ..data.clip import segment_of
from ..data.digests import DigestCache
from ..priors.kinds import source_class
from ..priors.prior import MotionPrior, PriorSettings
from ..priors.requests import PriorRequest, request_key
from ..priors.storage import EXTRACTION, PriorStore, prior_keys

#: Number of first samples without any prior that counts as a mistake of the settings.
PATIENCE = 32


class PriorLookup:
    """Stored priors as a function of video, question and answer.

    The teacher, its settings and the text that it was given are those of the store's newest extraction.

    Args:
        folder: the `--prior_dir` of `python -m motionenhancer extract`.
        grid: (F, H, W) that a prior must have; None takes any. `grid=True` takes that of the first prior.

    Attributes:
        teacher: path of the teacher that made the priors.
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
        self.store = PriorStore(Path(folder))
        record = self.store.folder / EXTRACTION
        try:
            made = json.loads(record.read_text("utf-8"))
            self.teacher, self.source = str(made["teacher"]["path"]), str(made["prompt_source"])
            self._recipe = str(made["teacher"]["id"]), PriorSettings(**made["settings"])
        except FileNotFoundError:
            raise ValueError(
                f"prior_dir {folder}: holds no {EXTRACTION}; make the priors with "
                "python -m motionenhancer extract --prior_dir and the options of your data and teacher"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record}: not the record of an extraction ({error})") from error
        first = next(iter(self.store), None)
        if first is None:
            raise ValueError(f"prior_dir {folder}: holds no prior; run the extraction to its end")
        if grid is True:
            grid = self.store.read(first).grid
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
            prior = self._find(sample)
            if self.grid is not None and prior.grid != self.grid:
                raise ValueError(f"its grid is {prior.grid}, the aligner's {self.grid}")
        except (ValueError, OSError) as error:
            self.leave_out(str(error), sample.id)
        except KeyError:
            self.leave_out("no such prior in the store", sample.id)
        else:
            self.found += 1
            return prior
        return None

    def leave_out(self, reason: str, name: str) -> None:
        """Count a sample without a prior.

        Raises:
            ValueError: see `of`.
        """
        self.missing[reason] += 1
        if not self.found and self.missing.total() >= PATIENCE:
            raise ValueError(
                f"none of the first {PATIENCE} samples has a prior in {self.store.folder}, which "
                f"{self.teacher} made from the {self.source} text; the last is {name}: {reason}. Extract "
                "priors from the same videos and conversations"
            )

    def _find(self, sample: Sample) -> MotionPrior:
        if len(sample.videos) != 1:
            raise ValueError(f"alignment needs one video, the sample has {len(sample.videos)}")
        text, _ = prompt_text(sample, self.source)  # type: ignore[arg-type]
        video = segment_of(sample.videos[0])
        path = video.path if isinstance(video, Clip) else video
        source = source_class(self.teacher)
        said = "" if source is None else source.said(sample, self.source)
        request = PriorRequest(video, text, said=said)
        return self.store.read(request_key(self._key, self._digests.digest(path), request))

    @cached_property
    def _key(self) -> Any:
        return prior_keys(*self._recipe)

    @cached_property
    def _digests(self) -> DigestCache:
        return DigestCache(self.store.folder, writes=False)

    def __getstate__(self) -> dict[str, Any]:
        """Workers of a data loader open what cannot be pickled anew."""
        return {name: value for name, value in vars(self).items() if name not in ("_key", "_digests")}
