"""Find a teacher's words among a student's tokens, by their common characters."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..data.sample import Sample, prompt_text
from .layout import TokenLayout


@dataclass(frozen=True)
class WordMap:
    """Which student tokens stand for which teacher tokens.

    rows: student token indices, grouped by teacher token and ascending within each group.
    row_tokens: index of the teacher token of each row; same length as ``rows``.
    count: number of teacher tokens.
    """

    rows: list[int]
    row_tokens: list[int]
    count: int

    @property
    def dropped(self) -> list[int]:
        """Indices of the teacher tokens without a row."""
        return sorted({*range(self.count)} - {*self.row_tokens})

    @property
    def mapped(self) -> int:
        """Number of teacher tokens with a row."""
        return len({*self.row_tokens})

    def after(self, row: int) -> WordMap:
        """Return the mapping without student tokens before ``row``, such as those that cannot see the video.

        >>> WordMap([1, 4, 5], [0, 0, 1], 3).after(5)
        WordMap(rows=[5], row_tokens=[1], count=3)
        """
        kept = [(r, t) for r, t in zip(self.rows, self.row_tokens, strict=True) if r >= row]
        return WordMap([r for r, _ in kept], [t for _, t in kept], self.count)


class Worded(Protocol):
    """An object with words: a prior, or only a text.

    spans: character ranges of the words in ``prompt``.
    """

    @property
    def spans(self) -> Sequence[tuple[int, int]]: ...

    @property
    def prompt(self) -> str: ...


def find_words(sample: Sample, prior: Worded, layout: TokenLayout, source: str) -> WordMap:
    """Map a prior's words to a sample's tokens; `layout` is the layout of these tokens.

    Tokens before the video cannot see it. So a word that is only before the video is dropped.
    """
    _, segments = prompt_text(sample, source)  # type: ignore[arg-type]
    words = map_words(
        prior.spans, prior.prompt, segments, layout.text, layout.offsets, message_spans=layout.message_spans
    )
    return words.after(layout.videos[0].first - layout.start) if layout.videos else words


def map_words(
    spans: Sequence[tuple[int, int]],
    prompt: str,
    segments: Sequence[tuple[int, int, int]],
    text: str,
    offsets: torch.Tensor | Sequence[tuple[int, int]],
    *,
    message_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> WordMap:
    """Map teacher tokens to the student tokens that share a character with them.

    Section 4 of the MotionEnhancer paper (CVPR 2026, arXiv 2606.06853): teacher and student split words
    differently; a teacher token's row is the average of the student rows that overlap it. White space never
    counts as overlap, as tokenizers attach a space to either neighbour.

    Args:
        spans: character ranges of the teacher's tokens in ``prompt``.
        prompt: the teacher's text.
        segments: (start, end, message_index) ranges of ``prompt`` that are verbatim text of a message, in
            order, as :func:`motionenhancer.data.prompt_text` returns them. Other characters of the prompt,
            such as the space it puts between messages, match nothing.
        text: the student's rendered conversation.
        offsets: (N, 2) character ranges of the student's tokens in ``text``, in order.
        message_spans: for each message the (start, end) in ``text`` of its text parts, as in
            :class:`motionenhancer.students.layout.TokenLayout`; the n-th segment of a message is searched
            only in the n-th of these. Without ``message_spans``, segments are searched one after another from
            the beginning, so an earlier repetition of a segment may be found instead.

    Returns:
        A :class:`WordMap`. A segment that the text does not contain maps nothing; differences in white space
        are ignored. If a message shows only a part of a segment, that part is mapped. An example is
        an answer whose thoughts the template drops.

    Raises:
        ValueError: a span or segment lies outside its text, or a segment names a message or part of one that
            does not exist.

    >>> tokens = [(0, 3), (3, 6), (6, 11)]
    >>> word_map = map_words([(0, 3), (4, 8)], "red ball", [(0, 8, 0)], "<s>red ball", tokens)
    >>> word_map.rows, word_map.row_tokens
    ([1, 2], [0, 1])
    """
    _check(spans, prompt, segments, message_spans)
    counterpart = _locate(prompt, segments, text, message_spans)
    owners = sorted(
        (counterpart[i], token)
        for token, (start, end) in enumerate(spans)
        for i in range(start, end)
        if i in counterpart
    )
    pairs: set[tuple[int, int]] = set()
    characters = [at for at, _ in owners]
    listed = offsets.tolist() if isinstance(offsets, torch.Tensor) else offsets
    for row, (start, end) in enumerate(listed):
        for _, token in owners[bisect_left(characters, start) : bisect_left(characters, end)]:
            pairs.add((token, row))
    ordered = sorted(pairs)
    return WordMap([row for _, row in ordered], [token for token, _ in ordered], len(spans))


def _check(
    spans: Sequence[tuple[int, int]],
    prompt: str,
    segments: Sequence[tuple[int, int, int]],
    message_spans: Sequence[Sequence[tuple[int, int]]] | None,
) -> None:
    parts: Counter[int] = Counter()
    for start, end in spans:
        if not 0 <= start <= end <= len(prompt):
            raise ValueError(
                f"spans must lie within the {len(prompt)} characters of prompt, got {(start, end)}"
            )
    for start, end, message in segments:
        if not 0 <= start <= end <= len(prompt):
            raise ValueError(
                f"segments must lie within the {len(prompt)} characters of prompt, got {(start, end)}"
            )
        if message_spans is None:
            continue
        if not 0 <= message < len(message_spans):
            raise ValueError(f"segments must name one of {len(message_spans)} messages, got {message}")
        parts[message] += 1
        if parts[message] > len(message_spans[message]):
            count = len(message_spans[message])
            raise ValueError(f"segments must not have more parts of message {message} than its {count}")


def _locate(
    prompt: str,
    segments: Sequence[tuple[int, int, int]],
    text: str,
    message_spans: Sequence[Sequence[tuple[int, int]]] | None,
) -> dict[int, int]:
    """Positions in ``text`` of the characters of the segments, without white space."""
    counterpart: dict[int, int] = {}
    parts: Counter[int] = Counter()
    cursor = 0
    for start, end, message in segments:
        first, last = cursor, len(text)
        if message_spans is not None:
            first, last = message_spans[message][parts[message]]
            parts[message] += 1
        whole = text.find(prompt[start:end].strip(), first, last)
        if whole >= 0:
            first, last = whole, whole + len(prompt[start:end].strip())
        # A template may change white space.
        ours, piece = _visible(prompt, start, end)
        theirs, shown = _visible(text, first, last)
        if (at := shown.find(piece)) >= 0:
            theirs = theirs[at : at + len(piece)]
        elif message_spans is not None and shown in piece:
            ours = ours[piece.rfind(shown) :]
        else:
            continue
        counterpart.update(zip(ours, theirs, strict=True))
        cursor = theirs[-1] + 1 if theirs else cursor
    return counterpart


def _visible(text: str, first: int, last: int) -> tuple[list[int], str]:
    """The places of all characters but white space, and these characters."""
    places = [i for i in range(first, last) if not text[i].isspace()]
    return places, "".join(text[i] for i in places)
