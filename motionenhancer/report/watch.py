"""A few samples of a run, read from its student before and after training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from ..alignment.aligner import align
from ..alignment.dataset import MotionDataset
from ..alignment.trainer import MotionTrainer
from ..data import Sample, prompt_text
from ..data.sample import whole_words
from ..evaluation.judge import same_text
from ..priors.prior import MotionPrior
from ..students.reading import StudentMaps, read_maps
from ..students.words import find_words
from .page import write_run_page
from .picture import contact_sheet
from .views import View, save_views

PICTURES = 4
"""Maximum number of clips whose contact sheets the trackers get."""
#: The trackers of `--report_to` that take pictures, and their modules.
_TRACKERS = {
    TensorBoardCallback: "",
    WandbCallback: "wandb",
    TrackioCallback: "trackio",
    MLflowCallback: "mlflow",
}


@dataclass(frozen=True)
class StudentReading(StudentMaps):
    """One reading of a sample by a student.

    Attributes:
        scores: {"loss_ar", "right", "said"}.
        answer: the text of the labels.
    """

    scores: dict[str, Any]
    answer: str


def add_maps(view: View, when: str, read: StudentReading, sample: Sample, source: str) -> bool:
    """Add to a view a student's maps of its words; return whether any of them was found.

    Args:
        view: view of the sample, which gets the maps.
        when: "before" or "after".
        read, sample: the student's reading of the sample.
        source: the text that the view shows: "both", "question" or "answer".
    """
    rows = read.of_words(find_words(sample, view, read.layout, source))
    if rows:
        view.grid, view.times, view.found = read.grid, read.times, sorted(rows)
        view.maps[when] = torch.stack([rows[word] for word in view.found])
    return bool(rows)


@torch.no_grad()
def read_student(
    model: Any, dataset: MotionDataset, sample: Sample, autocast: AbstractContextManager[Any] | None = None
) -> StudentReading:
    """Run a student over one sample in evaluation mode; no random number is drawn.

    An answer counts as right if each of its tokens is the most likely one, given the right tokens before it,
    that is, if greedy decoding would write it.

    Args:
        model: a model of the dataset's family; its mode is restored.
        dataset: gives frame sampling and text encoding.
        sample: a sample with one video.
        autocast: autocast context of the training's mixed precision.

    Raises:
        ValueError, OSError: the sample cannot be read, or has no single video.
    """
    if len(sample.videos) != 1:
        raise ValueError(f"needs one video, has {len(sample.videos)}")
    video = dataset.frames.of(sample.videos[0])
    maps, out, labels = read_maps(
        model,
        dataset.family,
        dataset.processor,
        sample,
        video,
        dataset.source,
        max_pixels=dataset.max_pixels,
        autocast=autocast,
    )
    learnt = labels != -100
    likeliest = out.logits[0, :-1][learnt.to(out.logits.device)].argmax(dim=-1)
    decode = dataset.processor.tokenizer.decode
    texts = (likeliest, labels[learnt])
    said, answer = (decode(ids.tolist(), skip_special_tokens=True).strip() for ids in texts)
    scores = {"loss_ar": float(out.loss), "right": same_text(said, answer), "said": said}
    return StudentReading(**vars(maps), scores=scores, answer=answer)


def task_of(sample: Sample) -> str:
    """Return a sample's task: its row's own, or the letters at the end of its id, or "".

    >>> task_of(Sample("clip-00012-MR", [])), task_of(Sample("line-7", []))
    ('MR', '')
    """
    last = sample.id.rpartition("-")[2] if "-" in sample.id else ""
    return sample.task or (last if last.isalpha() else "")


@dataclass
class Watch(TrainerCallback):
    """Reads samples of a run before and after training, saves the readings, and writes the page.

    The trackers of `--report_to` get contact sheets. It does not change the training. Its methods never
    raise, so that a page cannot end a run.

    Attributes:
        trainer: has the student on its device, and the samples.
        count: number of samples; 0 reads nothing and writes no page.
        whole: whether this process has all weights. If not, all processes must call `read` together during
            training, because the engine shards the weights when the training begins.
        readings: "before", "after" → sample id → reading of the student.
        views: the samples with their readings, once the training has ended.
    """

    trainer: MotionTrainer
    count: int
    whole: bool = True
    readings: dict[str, dict[str, StudentReading]] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    failed: bool = False

    def begin(self) -> None:
        """Read the student before the training, and join the Trainer's callbacks."""
        # At the front: each tracker's own callback closes it at the end of the training.
        self.trainer.callback_handler.callbacks.insert(0, self)
        if self.whole:
            # A continued run loads its weights later.
            self.read("before")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.whole and state.global_step == 0:
            self.read("before")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.read("after")
        if state.is_world_process_zero:
            self._try(self._show)

    @property
    def dataset(self) -> MotionDataset:
        assert isinstance(self.trainer.train_dataset, MotionDataset)
        return self.trainer.train_dataset

    def samples(self) -> list[Sample]:
        """Return evenly spaced samples of those with a prior; if no sample has one, of all samples."""
        dataset = self.dataset
        known = dataset.keys.keys() | dataset.requests.keys()
        listed = [s for s in dataset.samples if len(s.videos) == 1 and (not known or s.id in known)]
        chosen = np.linspace(0, len(listed) - 1, min(self.count, len(listed))).round().astype(int)
        return [listed[i] for i in chosen]

    def read(self, when: str) -> None:
        """Read all samples; `when` is "before" or "after"."""
        self._try(lambda: self._read(when))

    def keep(self, folder: Path) -> None:
        """Save the readings in a run's output folder."""
        if self.trainer.is_world_process_zero():
            self._try(lambda: save_views(folder, self.views))

    def write(self, folder: Path) -> None:
        """Write the run's page into its output folder, which holds the run's report."""
        self._try(lambda: print(f"page of the run: {write_run_page(folder)}"))

    def _show(self) -> None:
        """Make the views, and send contact sheets of the first ones to the trackers."""
        self.views = [self._view(sample) for sample in self.samples()]
        callbacks, step = self.trainer.callback_handler.callbacks, self.trainer.state.global_step
        log_pictures(callbacks, ((view.id, contact_sheet(view)) for view in self.views[:PICTURES]), step)

    def _read(self, when: str) -> None:
        model = self.trainer.model if self.whole else self.trainer.model_wrapped
        found, device = self.readings.setdefault(when, {}), self.trainer.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for sample in self.samples():
                if not self.whole and not self._everywhere(sample):
                    continue
                try:
                    autocast = self.trainer.accelerator.autocast()
                    found[sample.id] = read_student(model, self.dataset, sample, autocast)
                except (ValueError, OSError):
                    continue  # The training reports it too.

    def _everywhere(self, sample: Sample) -> bool:
        """Whether every process can read a clip: a forward pass of sharded weights needs all of them."""
        try:
            self.dataset.frames.of(sample.videos[0])
            readable = True
        except (ValueError, OSError):
            readable = False
        return all(gather_object([readable]))

    def _view(self, sample: Sample) -> View:
        trainer, source = self.trainer, self.dataset.source
        text, _ = prompt_text(sample, source)  # type: ignore[arg-type]
        prior = self._prior(sample)
        view = View(sample.id, text, sample.videos[0], task_of(sample), spans=whole_words(text))
        if prior is not None:
            view = View.of_prior(prior, id=sample.id, video=sample.videos[0], task=view.task)
        for when, readings in self.readings.items():
            if (read := readings.get(sample.id)) is None:
                continue
            view.scores[when], view.answer = dict(read.scores), read.answer
            if not add_maps(view, when, read, sample, source) or prior is None:
                continue
            distance = align(
                view.maps[when][None].to(trainer.args.device),
                prior,
                grid=read.grid,
                row_tokens=torch.tensor([view.found]),
                # Before training the aligner is the identity.
                aligner=trainer.aligner if when == "after" else None,
                loss=trainer.alignment_loss,
                temperature=trainer.prior_temperature,
                normalize=trainer.normalize_rows,
            )
            view.scores[when]["loss_align"] = float(distance)
        return view

    def _prior(self, sample: Sample) -> MotionPrior | None:
        try:
            if sample.id in self.dataset.keys:
                return self.dataset.store.read(self.dataset.keys[sample.id])
            request = self.dataset.requests.get(sample.id)
            # The training requests no prior for a clip that the student cannot read; nor does the page.
            readable = any(sample.id in found for found in self.readings.values())
            if request is not None and readable and self.trainer.online is not None:
                return self.trainer.online.maker.submit(request).result().prior
        except Exception as error:
            print(f"{sample.id}: the page does not show its prior ({' '.join(str(error).split())})")
        return None

    def _try(self, do: Callable[[], Any]) -> None:
        if self.count == 0 or self.failed:
            return
        try:
            with torch.no_grad():
                do()
        except Exception as error:
            self.failed = True
            print(f"page of the run not written: {' '.join(str(error).split()) or type(error).__name__}")


def log_pictures(callbacks: Iterable[Any], pictures: Iterable[tuple[str, Image.Image]], step: int) -> None:
    """Send pictures to every open tracker that takes them; a tracker that fails is named and left out.

    Args:
        callbacks: the Trainer's callbacks, before the trackers close at the end of the training.
        pictures: pairs of a unique name and a picture. Only read if there is a tracker.
        step: the step at which they are shown.
    """
    trackers = [(c, module) for c in callbacks for kind, module in _TRACKERS.items() if isinstance(c, kind)]
    if not trackers:
        return
    named = {f"maps/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}": picture for name, picture in pictures}
    for callback, module in trackers:
        try:
            _log(callback, module, named, step)
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"{module or 'tensorboard'}: got no pictures ({said})")


def _log(callback: Any, module: str, pictures: dict[str, Image.Image], step: int) -> None:
    tracker = import_module(module) if module else None
    if tracker is None:
        for name, picture in pictures.items():
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif module == "mlflow":
        for name, picture in pictures.items():
            tracker.log_image(picture, f"{name}.png")
    else:
        shown = {name: tracker.Image(picture) for name, picture in pictures.items()}
        # Both trackers use the Trainer's step count as their axis.
        tracker.log({**shown, "train/global_step": step})
