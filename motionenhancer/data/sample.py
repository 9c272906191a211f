"""A sample: a conversation about videos, and the part of its text for the teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .clip import Clip


@dataclass(frozen=True)
class Sample:
    """One conversation in the form that chat templates take.

    id: the id of the data file, or ``line-<n>``.
    messages: ``[{"role": "system" | "user" | "assistant", "content": [part, ...]}]``, each part one of
        ``{"type": "text", "text": str}``, ``{"type": "video"}`` and ``{"type": "image"}``. Texts are stripped
        and not empty. An answer that is not learnt has ``"loss": False`` beside its content.
    videos, images: files, in the order of their parts. A video whose row gives a segment or frames is a
        :class:`Clip`.
    line: 1-based line of the data file where the sample starts. offset: its first byte.
    task: the row's task, for reports only; may be empty.
    regions: the row's regions of words, unchanged; see `motionenhancer.priors.regions`.
    """

    id: str
    messages: list[dict[str, Any]]
    videos: tuple[Path | Clip, ...] = ()
    images: tuple[Path, ...] = ()
    line: int = 0
    offset: int = 0
    task: str = ""
    regions: tuple[Any, ...] = ()


_ROLES: dict[str, tuple[str, ...]] = {
    "both": ("user", "assistant"),
    "question": ("user",),
    "answer": ("assistant",),
}


def prompt_text(
    sample: Sample, source: Literal["both", "question", "answer"] = "both"
) -> tuple[str, list[tuple[int, int, int]]]:
    """Return the text for the teacher, and the source of each piece of it.

    The text parts of the chosen messages, in order, are joined by one space. System messages are never
    included, nor answers that are left out of the loss.

    The paper (MotionEnhancer, arXiv 2606.06853) does not settle which text the teacher gets: its Algorithm 1
    gives it the question; its figures (1A, 2 and 3B, and 3 and 5 of the supplement) show a description. The
    default is question and answer together.

    Args:
        sample: a sample of the readers.
        source: "both", "question" (user messages only) or "answer" (assistant messages only).

    Returns:
        The text and its segments, each (start, end, message_index): `text[start:end]` is an exact
        part of a text of `sample.messages[message_index]`. Segments ascend and do not overlap.

    Raises:
        ValueError: the source is unknown, or the sample has no text of that source.

    Example:
        >>> turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}
        >>> reply = {"role": "assistant", "content": [{"type": "text", "text": "The ball."}]}
        >>> prompt_text(Sample("a", [turn, reply]))
        ('What moves? The ball.', [(0, 11, 0), (12, 21, 1)])
    """
    if source not in _ROLES:
        raise ValueError(f"source must be 'both', 'question' or 'answer', got {source!r}")
    text = ""
    segments: list[tuple[int, int, int]] = []
    for index, message in enumerate(sample.messages):
        if message["role"] not in _ROLES[source] or message.get("loss") is False:
            continue
        for part in message["content"]:
            piece = part.get("text", "").strip() if part["type"] == "text" else ""
            if piece:
                text += " " if text else ""
                segments.append((len(text), len(text) + len(piece), index))
                text += piece
    if not segments:
        raise ValueError(f"sample {sample.id!r} has no {source} text")
    return text, segments


def whole_words(text: str) -> list[tuple[int, int]]:
    """Return the character ranges of a text's words, split at white space.

    >>> whole_words("It moves.")
    [(0, 2), (3, 9)]
    """
    return [match.span() for match in re.finditer(r"\S+", text)]
