"""Samples for the Trainer: decoded and tokenised, with the prior's words located among the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data import Sample
from ..data.sampling import Frames
from ..priors.prior import MotionPrior
from ..priors.requests import PriorRequest
from ..priors.storage import PriorStore
from ..students.family import StudentFamily
from ..students.layout import Encoded, TokenLayout
from ..students.words import WordMap, find_words


@dataclass(frozen=True)
class Alignment:
    """The inputs of a batch's alignment loss.

    Its tensors stay on the CPU when the batch goes to a device, because their values decide what runs, and
    reading them from the device would wait for it.

    Attributes:
        rows: (B, R) int64 student token positions, -1 = padding.
        columns: (B, C) int64 vision token positions, -1 = padding.
        row_tokens: (B, R) int64, index of the kept teacher token of each row, -1 = padding.
        grids: (F, H, W) of the student's vision tokens, one for each sample.
        priors: one for each sample; None for a sample without a prior.
        count: number of samples with at least one row.
        words, mapped: number of kept teacher tokens of the batch, and how many of them were found among the
            student's tokens.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    row_tokens: torch.Tensor
    grids: list[tuple[int, int, int]]
    priors: list[MotionPrior | None]
    count: int
    words: int
    mapped: int


class Wanted(NamedTuple):
    """A sample and the request of its prior."""

    sample: Sample
    request: PriorRequest


@dataclass(frozen=True)
class PendingAlignment:
    """A batch's `Alignment` before its priors are made.

    Attributes:
        wanted: each sample and the request of its prior; None for a sample without a request.
        layouts: positions of each sample's tokens in the padded batch.
        source: the text from which the priors are made: "both", "question" or "answer".
    """

    wanted: list[Wanted | None]
    layouts: list[TokenLayout]
    source: str

    def complete(self, priors: Sequence[MotionPrior | None]) -> Alignment | None:
        """Return the alignment with these priors, one per sample."""
        words = [
            find_words(wanted.sample, prior, layout, self.source) if wanted and prior else None
            for wanted, layout, prior in zip(self.wanted, self.layouts, priors, strict=True)
        ]
        return align_batch(priors, words, self.layouts)


@dataclass(frozen=True)
class Item:
    """One encoded sample for collation, with its prior, or with a request if the prior is not made yet."""

    id: str
    encoded: Encoded
    prior: MotionPrior | None
    words: WordMap | None
    skipped: dict[str, str]
    wanted: Wanted | None = None


class MotionDataset(Dataset[Item]):
    """Samples that are decoded and tokenised on access.

    If a sample cannot be read, the next one in the list takes its place and `Item.skipped` names it. So every
    process of a distributed run makes the same number of steps.

    Args:
        samples, family, processor: from `read_samples` and `load_student`.
        keys: sample id → key of its prior in `store`; samples without a key are trained without alignment.
        requests: sample id → request of the prior that is made during training; see `online`.
        source: the text from which the priors were made: "both", "question" or "answer".
        fps: frames per second that the student sees, thinned to at most `max_frames`. The keys of the
            sample's row have priority; see `data.Clip`.
        num_frames: number of evenly spaced frames of each clip; replaces `fps` and `max_frames`.
        cache_bytes: maximum bytes of encoded samples and priors that are kept, so that later epochs do not
            read them again. Each data-loading worker keeps its own.
        max_pixels: maximum pixels of a frame; None keeps the processor's own limit.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        family: StudentFamily,
        processor: Any,
        *,
        keys: dict[str, str],
        store: PriorStore,
        source: str = "both",
        fps: float = 1.0,
        max_frames: int = 64,
        max_pixels: int | None = None,
        num_frames: int | None = None,
        cache_bytes: int = 0,
        requests: Mapping[str, PriorRequest] | None = None,
    ) -> None:
        self.requests = dict(requests or {})
        self.samples, self.family, self.processor = list(samples), family, processor
        self.keys, self.store, self.source = keys, store, source
        self.max_pixels = max_pixels
        self.frames = Frames(num_frames, fps, max_frames=max_frames)
        self._kept: dict[int, Item] = {}
        self._left = cache_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        if index in self._kept:
            return self._kept[index]
        item = self._read(index)
        size = item.encoded.nbytes + (0 if item.prior is None else item.prior.attention.nbytes)
        if not item.skipped and size <= self._left:
            self._kept[index] = item
            self._left -= size
        return item

    def _read(self, index: int) -> Item:
        skipped: dict[str, str] = {}
        for offset in range(len(self.samples)):
            sample = self.samples[(index + offset) % len(self.samples)]
            try:
                return self._load(sample, skipped)
            except (ValueError, OSError) as error:
                skipped[sample.id] = str(error)
        raise ValueError(
            f"none of the {len(self.samples)} samples can be read; the first: {next(iter(skipped.items()))}"
        )

    def _load(self, sample: Sample, skipped: dict[str, str]) -> Item:
        videos = [self.frames.of(video) for video in sample.videos]
        run = self.frames.num_frames
        if self.family.equal_frames and run is not None and (own := {len(v.frames) for v in videos} - {run}):
            raise ValueError(
                f"its row asks for {max(own)} frames, but {self.family.name} needs the same number of frames "
                f"in all clips, and this run takes {run}"
            )
        encoded = self.family.encode(self.processor, sample, videos, max_pixels=self.max_pixels)
        prior, words = None, None
        if sample.id in self.keys:
            try:
                prior = self.store.read(self.keys[sample.id])
            except KeyError as error:
                # Another process may have set it aside since the run was planned.
                raise ValueError(str(error.args[0])) from None
            words = find_words(sample, prior, encoded.layout, self.source)
        request = self.requests.get(sample.id)
        wanted = None if request is None else Wanted(sample, request)
        return Item(sample.id, encoded, prior, words, skipped, wanted)


class MotionCollator:
    """Pads items to a batch of model inputs and adds `ids`, `skipped` and `alignment` for `MotionTrainer`.

    Args:
        family, processor: the student's.
        padding_side: "right" or "left".
        source: the text from which requested priors are made.
    """

    def __init__(
        self, family: StudentFamily, processor: Any, padding_side: str = "right", source: str = "both"
    ) -> None:
        self.family, self.source = family, source
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.padding_side = padding_side

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = self.family.collate(
            [item.encoded for item in items], pad_token_id=self.pad_token_id, padding_side=self.padding_side
        )
        layouts, wanted = batch.pop("layouts"), [item.wanted for item in items]
        if any(one is not None for one in wanted):
            batch["alignment"] = PendingAlignment(wanted, layouts, self.source)
        else:
            priors, words = [item.prior for item in items], [item.words for item in items]
            batch["alignment"] = align_batch(priors, words, layouts)
        batch["ids"] = [item.id for item in items]
        batch["skipped"] = {k: v for item in items for k, v in item.skipped.items()}
        return batch


def align_batch(
    priors: Sequence[MotionPrior | None], words: Sequence[WordMap | None], layouts: Sequence[TokenLayout]
) -> Alignment | None:
    """Rows, columns and priors of a batch; None if no sample has a prior with a mapped word.

    Args:
        priors, words: each sample's prior and the rows of its words, or None.
        layouts: positions of each sample's tokens in the padded batch.
    """
    none = torch.zeros(0, dtype=torch.int64)
    rows, tokens, columns, grids, used = [], [], [], [], []
    for prior, found, layout in zip(priors, words, layouts, strict=True):
        usable = prior is not None and found is not None and bool(found.rows) and bool(layout.videos)
        used.append(prior if usable else None)
        rows.append(torch.tensor(found.rows) + layout.start if usable and found else none)
        tokens.append(torch.tensor(found.row_tokens) if usable and found else none)
        columns.append(layout.videos[0].positions if usable else none)
        grids.append(layout.videos[0].grid if usable else (1, 1, 1))
    count = sum(prior is not None for prior in used)
    if not count:
        return None
    counted = [found for found in words if found is not None]
    return Alignment(
        rows=pad_sequence(rows, batch_first=True, padding_value=-1),
        columns=pad_sequence(columns, batch_first=True, padding_value=-1),
        row_tokens=pad_sequence(tokens, batch_first=True, padding_value=-1),
        grids=grids,
        priors=used,
        count=count,
        words=sum(found.count for found in counted),
        mapped=sum(found.mapped for found in counted),
    )
