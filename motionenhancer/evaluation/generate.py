"""Ask a student questions in batches, so that a kill does not change the answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.clip import Clip
from ..data.question import Question
from ..data.sample import Sample
from ..data.sampling import Frames
from ..data.video import Video, VideoError, outline
from ..processes import from_main
from ..students.family import StudentFamily
from ..students.layout import Encoded
from .answers import (
    answers_file,
    append_answers,
    drop_answers,
    is_marked,
    mark_clip,
    mend_answers,
    read_answers,
)
from .subtitles import with_subtitles


@dataclass(frozen=True)
class Asked:
    """A question with its request, and the file of its clip or None.

    subtitles: srt file whose text is put before the request; None if the run shows no subtitles.
    look: change of the clip's frames before they are shown; None for no change.
    """

    question: Question
    prompt: str
    video: Path | Clip | None
    subtitles: Path | None = None
    look: Callable[[Video], Video] | None = None


class Engine(NamedTuple):
    """What answers questions.

    encode: (id, prompt, video, clip=file) → a request; raises ValueError where the question cannot be put.
    answer: requests, at least one → the text of each one's answer, special tokens removed.
    """

    encode: Callable[..., Any]
    answer: Callable[[Sequence[Any]], list[str]]


def transformers_engine(
    model: Any, processor: Any, family: StudentFamily, *, max_pixels: int | None, max_new_tokens: int
) -> Engine:
    """transformers' own generation by what :func:`load_student` returned; see :func:`encode_request`."""
    settings = greedy(model, max_new_tokens, processor.tokenizer.pad_token_id)
    return Engine(
        partial(encode_request, family, processor, max_pixels=max_pixels),
        partial(generate_answers, model, processor, family, settings=settings),
    )


def conversation(id: str, prompt: str, clip: Path | Clip | None) -> Sample:
    """A question about a clip with a stand-in for the answer; see :func:`encode_request`."""
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    return Sample(id, [asked, reply], () if clip is None else (clip,))


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
    """Tokens of a user's turn, video first, up to the start of the assistant's answer.

    The conversation is encoded as in training, with a placeholder for the answer, and cut where its labels
    begin. So in every family the answer starts at the same place as in training.

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
    encoded = family.encode(processor, conversation(id, prompt, clip), [video], max_pixels=max_pixels)
    trained = (encoded.labels != -100).nonzero()[:, 0]
    if not len(trained):
        raise ValueError(f"question {id!r}: the chat template has no place for an answer")
    cut = slice(0, int(trained[0]))
    return replace(
        encoded,
        input_ids=encoded.input_ids[cut],
        attention_mask=encoded.attention_mask[cut],
        labels=encoded.labels[cut],
        token_inputs={name: tensor[cut] for name, tensor in encoded.token_inputs.items()},
    )


def greedy(model: Any, max_new_tokens: int, pad_token_id: int) -> Any:
    """The model's own settings for one greedy answer. Its repetition penalty and end tokens stay."""
    config = copy.deepcopy(model.generation_config)
    unset = dict.fromkeys(("temperature", "top_p", "top_k", "penalty_alpha", "max_length"))
    config.update(do_sample=False, num_beams=1, num_return_sequences=1, **unset)
    config.update(max_new_tokens=max_new_tokens, pad_token_id=pad_token_id)
    return config


def generate_answers(
    model: Any, processor: Any, family: StudentFamily, requests: Sequence[Encoded], settings: Any
) -> list[str]:
    """Greedy answers, without special tokens, to a batch of requests that is padded on the left.

    Args:
        model, processor, family: from :func:`load_student`.
        requests: from :func:`encode_request`, at least one.
        settings: from :func:`greedy`.
    """
    batch = family.collate(requests, pad_token_id=settings.pad_token_id, padding_side="left")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, value in list(batch.items()):
        if name in ("layouts", "labels"):
            del batch[name]
        elif isinstance(value, torch.Tensor):
            # Pixels take the model's dtype; times and grids keep theirs.
            pixels = value.is_floating_point() and value.ndim > 1
            batch[name] = value.to(model.device, dtype if pixels else None)
    with torch.inference_mode():
        tokens = model.generate(**batch, generation_config=settings)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def answer_questions(
    load: Callable[[], Engine],
    asked: Sequence[Asked],
    folder: Path,
    frames: Frames,
    *,
    length: Callable[[Video], int] | None = None,
    batch_size: int = 4,
    workers: int = 0,
) -> None:
    """Answer every question without an answer in ``folder``, with one process or several.

    See :func:`open_batches` for the batches. Each batch is on disk before the next one starts.

    Unreadable clips, and questions that cannot be encoded, are recorded as skipped with the reason. The next
    run tries them again.

    Args:
        load: returns who answers; called at most once, and only when an answer is missing.
        folder: where this run keeps its answers.
        asked, frames, length, batch_size: as for :func:`open_batches`.
        workers: processes that decode clips ahead; 0 decodes in this one.
    """
    state = PartialState()
    batches: list[list[str]] = []
    if state.is_main_process:
        # Another process than this one may have written them.
        drop_answers(folder, _outdated(asked, read_answers(folder)))
        batches = open_batches(asked, unanswered(asked, folder), frames, length, batch_size)
    items = {item.question.id: item for item in asked}
    # All processes share the batches of one process: another one may see other files.
    shared = from_main(batches)[state.process_index :: state.num_processes]
    mine = [[items[id] for id in batch] for batch in shared]
    if mine:
        engine = load()
        file = folder / answers_file(state.process_index)
        mend_answers(file)
        encode = partial(encode_batch, encode=engine.encode, frames=frames)
        loader: DataLoader[Any] = DataLoader(mine, batch_size=None, num_workers=workers, collate_fn=encode)  # type: ignore[arg-type]
        shown: dict[str, Any] = {"unit": "question", "disable": not state.is_main_process}
        with tqdm(total=sum(map(len, mine)), desc="answers", **shown) as progress:
            for rows, encoded in loader:
                if encoded:
                    outputs = iter(engine.answer(encoded))
                    rows = [row if "skipped" in row else {**row, "output": next(outputs)} for row in rows]
                append_answers(file, rows)
                progress.update(len(rows))
    state.wait_for_everyone()


def unanswered(asked: Sequence[Asked], folder: Path) -> set[str]:
    """Ids of the questions that have a clip and no answer to that very clip in ``folder`` yet."""
    # Skipped questions are tried again: the clip may have been copied meanwhile.
    rows = read_answers(folder)
    done = {id for id, row in rows.items() if "output" in row} - _outdated(asked, rows)
    return {item.question.id for item in asked if item.video is not None} - done


def open_batches(
    asked: Sequence[Asked],
    open: set[str],
    frames: Frames,
    length: Callable[[Video], int] | None,
    batch_size: int,
) -> list[list[str]]:
    """The batches that are still to be asked, each as the ids of its questions.

    All questions with a clip are sorted, the longest first, and cut into batches, whether they are answered
    or not. So a batch that was never asked is the same after a kill, with the same padding, rounding and
    answers. Other open questions, such as those that were skipped, come last, in batches of their own.

    Args:
        asked: all questions of the run.
        open: ids of those without an answer.
        frames: how clips are shown.
        length: (a clip's frames, with all pixels 0) → a number that grows with the clip's tokens. Questions
            about clips of equal length keep their order. With None, all questions keep their order.
        batch_size: how many questions are asked at once.
    """
    order = [item for item in asked if item.video is not None] if open else []
    if length is not None:
        lengths: dict[Path | Clip | None, int] = {}
        clips = dict.fromkeys(item.video for item in order)
        for video in tqdm(clips, desc="lengths", unit="clip", leave=False, delay=2):
            assert video is not None
            with suppress(VideoError):  # It is reported when its question is asked.
                lengths[video] = length(frames.of(video, read=outline))
        order.sort(key=lambda item: -lengths.get(item.video, 0))
    batches = _cut([item.question.id for item in order], batch_size)
    whole = [batch for batch in batches if open.issuperset(batch)]
    rest = open.difference(*whole)
    return whole + _cut([item.question.id for item in order if item.question.id in rest], batch_size)


def _cut(ids: list[str], size: int) -> list[list[str]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _outdated(asked: Sequence[Asked], rows: dict[str, dict[str, Any]]) -> set[str]:
    """Ids of answers whose clip was replaced since."""
    shown = {item.question.id: item.video for item in asked if item.video is not None}
    return {id for id, video in shown.items() if not is_marked(rows.get(id, {}).get("clip"), video)}


def encode_batch(
    batch: Sequence[Asked], encode: Callable[..., Any], frames: Frames
) -> tuple[list[dict[str, str]], list[Any]]:
    """Return a row for each question of a batch, and the requests of the questions that are not skipped.

    The row of a skipped question holds the reason.

    Args:
        encode: of the :class:`Engine`.
        frames: how clips are shown.
    """
    rows: list[dict[str, str]] = []
    requests: list[Any] = []
    clip, video, mark = None, None, ""
    for item in batch:
        assert item.video is not None
        row = {"id": item.question.id}
        try:
            # Questions of one clip follow each other in the files.
            if video is None or clip != item.video:
                clip, video, mark = item.video, frames.of(item.video), mark_clip(item.video)
            prompt = item.prompt
            if item.subtitles is not None:
                prompt = with_subtitles(prompt, item.subtitles, video.timestamps)
            shown = video if item.look is None else item.look(video)
            requests.append(encode(row["id"], prompt, shown, clip=clip))
            row["clip"] = mark
        except (ValueError, OSError) as error:
            row["skipped"] = str(error)
        rows.append(row)
    return rows, requests
