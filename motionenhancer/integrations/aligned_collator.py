"""A collator that adds the alignment to the batches of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..alignment.dataset import align_batch
from ..data import Sample, SkipLog
from ..data.conversation import convert
from ..students.families import processor_family
from ..students.layout import TokenLayout
from ..students.words import find_words
from .lookup import PriorLookup
from .token_layout import read_layout, video_token

_NOWHERE = TokenLayout("", torch.zeros(0, 2, dtype=torch.int64), ())
_KEYS = ("messages", "conversations", "videos", "video", "images", "image", "system")


class AlignedCollator:
    """Adds `alignment` and `ids`, which `MotionTrainer` reads, to the batches of a collator.

    Args:
        collate: the framework's own collator: features → `input_ids` (B, N) and other inputs.
        priors: lookup of the priors.
        processor: processor of the student.
        row_of: the conversation of a feature, as a row of a data file with `messages` and `videos`, or None;
            called before `collate`, so that it may take the row out of the feature. By default the feature
            itself, or its `prompt` and `completion`.
        root: folder of relative paths of the rows' videos.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        priors: PriorLookup,
        processor: Any,
        *,
        row_of: Callable[[Any], Mapping[str, Any] | None] | None = None,
        root: str | Path = ".",
    ) -> None:
        self.collate, self.priors, self.processor = collate, priors, processor
        self.row_of, self.root = row_of or _row, Path(root)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Collate, and align the samples whose priors are stored.

        Raises:
            ValueError: the batch does not hold one row for each feature, as with packing; none of many
                samples has a prior; a video's tokens do not fill a grid.
        """
        features = list(features)
        rows = [self.row_of(feature) for feature in features]
        batch = dict(self.collate(features))
        ids = batch.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != len(features):
            shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(
                f"alignment needs a batch of input_ids with one row for each of {len(features)} samples, "
                f"got {shape}: switch packing and padding-free batches off"
            )
        priors, words, layouts, names = [], [], [], []
        grids = _grids(batch, self.processor)
        for index, row in enumerate(rows):
            sample = self._sample(row)
            prior = None if sample is None else self.priors.of(sample)
            layout, found = _NOWHERE, None
            if sample is not None and prior is not None:
                tokens, start = _unpadded(batch, index)
                layout = read_layout(tokens, sample, self.processor, **grids[index], start=start)
                found = find_words(sample, prior, layout, self.priors.source)
            priors.append(prior)
            words.append(found)
            layouts.append(layout)
            names.append("" if sample is None else f"{sample.id} {' '.join(map(str, sample.videos))}".strip())
        batch["alignment"], batch["ids"] = align_batch(priors, words, layouts), names
        return batch

    def _sample(self, row: Mapping[str, Any] | None) -> Sample | None:
        if row is None:
            self.priors.leave_out("the data set did not keep its row", "a sample")
            return None
        given = {name: row[name] for name in _KEYS if row.get(name) is not None}
        log = SkipLog(shout=0)
        sample = convert(given, 0, self.root, log, require_video=False, check_files=False)
        if sample is None:
            self.priors.leave_out(log.summary(), str(row.get("id", "a sample")))
        return sample


def _row(feature: Any) -> Mapping[str, Any]:
    if "prompt" in feature and "completion" in feature:
        return {**feature, "messages": [*feature["prompt"], *feature["completion"]]}
    return feature


def _grids(batch: Mapping[str, Any], processor: Any) -> list[dict[str, Any]]:
    """Grid arguments of `read_layout` for each sample's first video; token counts tell whose video it is."""
    ids, name = batch["input_ids"], processor_family(processor).grid_input
    given, part = batch.get(name), processor.video_processor
    if given is None:
        return [{} for _ in ids]
    frames = name == "video_position_ids"  # One entry for each frame, not for each video.
    if frames:
        sizes = ((given.amax(dim=1) + 1) // part.pooling_kernel_size).prod(dim=1).tolist()
    else:
        sizes = (given.prod(dim=1) // part.merge_size**2).tolist()
    found, at = list[dict[str, Any]](), 0
    for count in (ids == video_token(processor)).sum(dim=1).tolist():
        first = at
        while count > 0 and at < len(sizes):
            count, at = count - sizes[at], at + 1
        shown = {"position_ids": given[first:at]} if frames else {"grid_thw": given[first : first + 1]}
        found.append(shown if at > first else {})
    return found


def _unpadded(batch: Mapping[str, Any], index: int) -> tuple[torch.Tensor, int]:
    """The (N,) ids of a sample without padding, and the number of padding tokens before them."""
    ids, mask = batch["input_ids"][index], batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return ids, 0
    kept = mask[index].nonzero()[:, 0]
    first, last = int(kept[0]), int(kept[-1])
    return ids[first : last + 1], first
