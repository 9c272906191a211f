"""Put questions to a student in batches, so that a kill changes nothing in the answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from motionenhancer.data.clip import Clip
from motionenhancer.data.question import Question
from motionenhancer.data.sample import Sample
from motionenhancer.data.video import Video
from motionenhancer.students.family import StudentFamily
from motionenhancer.students.layout import Encoded

from .answers import answers_file, append_answers, mend_answers, read_answers
from .videos import Frames, sample_video

__all__ = ["Asked", "answer_questions", "encode_request", "generate_answers", "greedy"]


@dataclass(frozen=True)
class Asked:
    """A question with its request and its clip's file; None where there is no file."""

    question: Question
    prompt: str
    video: Path | Clip | None


def encode_request(
    family: StudentFamily,
    processor: Any,
    id: str,
    prompt: str,
    video: Video,
    *,
    clip: Path | Clip | None = None,
    max_pixels: int | None = None,
) -> Encoded:
    """Tokens of a user's turn, video first, up to where the assistant's answer begins.

    The conversation is encoded with a stand-in for the answer, as for training, and cut where its labels
    begin: so an answer is asked for exactly where training put it, in every family.

    Args:
        family, processor: the student's.
        id: for messages.
        prompt: text after the video.
        video: its frames.
        clip: where they come from; a row's own limits of a frame's pixels are taken from it.
        max_pixels: cap on the pixels of a frame as the model sees it.

    Returns:
        :class:`Encoded` of N tokens, labels all -100; ``layout`` is that of the uncut conversation.

    Raises:
        ValueError: as :meth:`StudentFamily.encode`.
    """
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    sample = Sample(id, [asked, reply], () if clip is None else (clip,))
    encoded = family.encode(processor, sample, [video], max_pixels=max_pixels)
    trained = (encoded.labels != -100).nonzero()[:, 0]
    if not len(trained):
        raise ValueError(f"question {id!r}: the chat template leaves no place for an answer")
    cut = slice(0, int(trained[0]))
    return replace(
        encoded,
        input_ids=encoded.input_ids[cut],
        attention_mask=encoded.attention_mask[cut],
        labels=encoded.labels[cut],
        token_inputs={name: tensor[cut] for name, tensor in encoded.token_inputs.items()},
    )


def greedy(model: Any, max_new_tokens: int, pad_token_id: int) -> Any:
    """The model's own generation settings with sampling off: its repetition penalty and end tokens stay."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        max_length=None,
        pad_token_id=pad_token_id,
    )
    return config


def generate_answers(
    model: Any, processor: Any, family: StudentFamily, requests: Sequence[Encoded], settings: Any
) -> list[str]:
    """Greedy answers to a batch of requests, padded on the left.

    Args:
        model, processor, family: from :func:`load_student`.
        requests: from :func:`encode_request`, at least one.
        settings: from :func:`greedy`.

    Returns:
        One text a request, special tokens removed.
    """
    batch = family.collate(requests, pad_token_id=settings.pad_token_id, padding_side="left")
    for name in ("layouts", "labels"):
        batch.pop(name)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = {name: _place(value, model.device, dtype) for name, value in batch.items()}
    with torch.inference_mode():
        tokens = model.generate(**batch, generation_config=settings)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def answer_questions(
    load: Callable[[], tuple[Any, Any, StudentFamily]],
    asked: Sequence[Asked],
    folder: Path,
    frames: Frames,
    *,
    max_new_tokens: int,
    batch_size: int = 4,
    workers: int = 0,
) -> None:
    """Answer every question that ``folder`` holds no answer of yet, under one process or several.

    Batches are cut from the whole list, whatever is answered already and however many processes there are,
    and a batch that was not finished is asked again as a whole: padding and thereby rounding are the same in
    a run that was killed, so are the answers. Each batch is on the disk before the next one starts.

    Args:
        load: returns what :func:`load_student` does; called at most once, and only when an answer is
            missing.
        asked: all questions of the run.
        folder: where this run keeps its answers.
        frames: how clips are shown.
        max_new_tokens, batch_size: of a request.
        workers: processes that decode clips ahead; 0 decodes in this one.

    Clips that cannot be read, and questions that cannot be put, are written down as skipped, with the reason,
    and tried again by the next run.
    """
    if batch_size < 1 or max_new_tokens < 1 or workers < 0:
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1 and workers at least 0, "
            f"got {batch_size}, {max_new_tokens} and {workers}"
        )
    state = PartialState()
    # What was skipped is tried again: the clip may have been on its way.
    done = {id for id, row in read_answers(folder).items() if "output" in row}
    state.wait_for_everyone()
    batches = [
        [item for item in asked[start : start + batch_size] if item.video is not None]
        for start in range(0, len(asked), batch_size)
    ]
    pending = [batch for batch in batches if any(item.question.id not in done for item in batch)]
    mine = pending[state.process_index :: state.num_processes]
    if mine:
        _answer_batches(load(), mine, folder, frames, max_new_tokens, workers)
    state.wait_for_everyone()


def _answer_batches(
    student: tuple[Any, Any, StudentFamily],
    batches: Sequence[Sequence[Asked]],
    folder: Path,
    frames: Frames,
    max_new_tokens: int,
    workers: int,
) -> None:
    model, processor, family = student
    state = PartialState()
    file = answers_file(folder, state.process_index)
    mend_answers(file)
    settings = greedy(model, max_new_tokens, processor.tokenizer.pad_token_id)
    loader: DataLoader[Any] = DataLoader(
        _Requests(batches, family, processor, frames), batch_size=None, num_workers=workers
    )
    progress = tqdm(
        total=sum(map(len, batches)),
        desc="answers",
        unit="question",
        disable=not state.is_main_process,
    )
    with progress:
        for ids, requests, failures in loader:
            rows = [{"id": id, "skipped": reason} for id, reason in failures]
            if requests:
                outputs = generate_answers(model, processor, family, requests, settings)
                rows += [{"id": id, "output": text} for id, text in zip(ids, outputs, strict=True)]
            append_answers(file, rows)
            progress.update(len(rows))


class _Requests(Dataset[Any]):
    """A batch at a time: ids and requests of what can be asked, ids and reasons of what cannot."""

    def __init__(
        self, batches: Sequence[Sequence[Asked]], family: StudentFamily, processor: Any, frames: Frames
    ) -> None:
        self.batches, self.family, self.processor, self.frames = batches, family, processor, frames

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[str], list[Encoded], list[tuple[str, str]]]:
        ids, requests, failures = [], [], []
        last: tuple[Path | Clip, Video] | None = None
        for item in self.batches[index]:
            assert item.video is not None
            try:
                # Questions of one clip stand together in the files.
                if last is None or last[0] != item.video:
                    last = item.video, sample_video(item.video, self.frames)
                request = encode_request(
                    self.family,
                    self.processor,
                    item.question.id,
                    item.prompt,
                    last[1],
                    clip=item.video,
                    max_pixels=self.frames.max_pixels,
                )
            except (ValueError, OSError) as error:
                failures.append((item.question.id, str(error)))
                continue
            ids.append(item.question.id)
            requests.append(request)
        return ids, requests, failures


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # Pixels take the model's dtype; times and grids keep theirs.
    pixels = value.is_floating_point() and value.ndim > 1
    return value.to(device, dtype if pixels else None)
