"""Render a conversation with the processor's chat template; locate messages and answers in the text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.sample import Sample


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    text: the output of the chat template.
    text_spans: for each message the (start, end) in ``text`` of its non-blank text parts.
    answer_spans: (start, end) of the content of each learnt assistant message, and of the token that ends it.
    """

    text: str
    text_spans: tuple[tuple[tuple[int, int], ...], ...]
    answer_spans: tuple[tuple[int, int], ...]


def render(processor: Any, sample: Sample, template: str | None = None) -> Rendered:
    """Render ``sample`` with the chat template of ``processor``, or with ``template``.

    A text part is located where the rendering changes when the part changes. An answer begins at the end of
    its prompt; or with its own text if the template puts something before it, such as white space or a block
    of thoughts. It ends with the text that the template puts after the last message of a conversation,
    without white space.

    Raises:
        ValueError: there are no messages or no assistant message; the first message is the assistant's; the
            template fails; or it renders a message differently after later messages are added, apart from a
            block of thoughts.
    """
    messages = sample.messages
    if not messages:
        raise ValueError(f"sample {sample.id!r} has no messages")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"sample {sample.id!r} has no assistant message to train on")
    if roles[0] == "assistant":
        raise ValueError(f"sample {sample.id!r} begins with an assistant message, so it has no question")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("loss") is not False]
    if not answers:
        raise ValueError(f"sample {sample.id!r} leaves every answer out of the loss")
    options = {} if template is None else {"chat_template": template}

    def shown(given: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return processor.apply_chat_template(
                list(given), tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:
            # Any error of the model's own template, such as one of its sandbox.
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"sample {sample.id!r}: the chat template fails ({said})") from error

    text, parts = shown(messages), {i: shown(messages[: i + 1]) for i in answers}
    try:
        text_spans = _text_spans(shown, messages, text)
        ends = {i: _end(shown, messages[: i + 1], part, text, text_spans[i]) for i, part in parts.items()}
    except ValueError:
        changed = next((i for i, part in parts.items() if not text.startswith(part)), None)
        if changed is None:
            raise
        raise _changed(sample, changed + 1) from None
    answer_spans: list[tuple[int, int]] = []
    for i in answers:
        prompt = shown(messages[:i], True)
        begins = text_spans[i][0][0] if text_spans[i] else ends[i]
        if text.startswith(prompt) and not text[len(prompt) : begins].strip():
            first = len(prompt)
        elif text_spans[i]:
            first = begins
        else:
            raise _changed(sample, i)
        answer_spans.append((first, first + len(text[first : ends[i]].rstrip())))
    return Rendered(text, text_spans, tuple(answer_spans))


_Shown = Callable[[Sequence[dict[str, Any]]], str]
_Spans = tuple[tuple[int, int], ...]


def _end(shown: _Shown, messages: Sequence[dict[str, Any]], part: str, text: str, spans: _Spans) -> int:
    """Return the end of the last of ``messages`` in ``text``; ``part`` is that message rendered alone.

    A template that shows thoughts only in the last answer renders an earlier answer differently, but ends it
    the same way.
    """
    if text.startswith(part):
        return len(part)
    behind = part[_text_spans(shown, messages, part)[-1][-1][1] :] if spans else ""
    if not spans or not text.startswith(behind.rstrip(), spans[-1][1]):
        raise ValueError("the chat template ends an earlier answer differently from the last answer")
    return spans[-1][1] + len(behind.rstrip())


def _changed(sample: Sample, count: int) -> ValueError:
    return ValueError(
        f"sample {sample.id!r}: the chat template renders the first {count} messages differently once "
        "later ones are added, so the answers cannot be located"
    )


def _text_spans(shown: _Shown, messages: Sequence[dict[str, Any]], text: str) -> tuple[_Spans, ...]:
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
    found = []
    for i, message in enumerate(messages):
        spans = []
        for j, part in enumerate(message["content"]):
            if part["type"] != "text" or not part["text"].strip():
                continue
            content = [*message["content"][:j], {**part, "text": mark}, *message["content"][j + 1 :]]
            other = shown([*messages[:i], {**message, "content": content}, *messages[i + 1 :]])
            at = other.find(mark)
            if at < 0:
                raise ValueError(f"the chat template does not show text part {j} of message {i}")
            # The template may show a part of the text, such as thoughts, before the mark. It may also show
            # the opening tag of thoughts if there are none.
            start = next((k for k in range(at) if text[k] != other[k]), at)
            if start < at:
                start = _with_opening(text, start, part["text"].lstrip())
            spans.append((start, len(text) - (len(other) - at - len(mark))))
        found.append(tuple(spans))
    return tuple(found)


def _with_opening(text: str, start: int, own: str) -> int:
    """Return the position of the beginning of ``own`` before ``start``; ``start`` if it is not there."""
    end = len(text[:start].rstrip())
    return next((end - k for k in range(min(end, len(own)), 0, -1) if text[end - k : end] == own[:k]), start)


def expand(text: str, replacements: Sequence[tuple[str, str]]) -> tuple[str, Callable[[int], int]]:
    """Replace placeholders, in order.

    Args:
        text: rendered conversation.
        replacements: (placeholder, replacement) in order of appearance; each is searched after the previous
            one.

    Returns:
        The text with replacements, and a function from positions in the old text to positions in the new
        text.

    Raises:
        ValueError: a placeholder is missing.

    >>> text, moved = expand("a <v> b", [("<v>", "<v><v>")])
    >>> text, moved(5), moved(6)
    ('a <v><v> b', 8, 9)
    """
    pieces: list[str] = []
    ends, growths = [0], [0]
    for placeholder, replacement in replacements:
        at = text.find(placeholder, ends[-1])
        if at < 0:
            raise ValueError(f"the rendered conversation has too few placeholders {placeholder!r}")
        pieces += [text[ends[-1] : at], replacement]
        ends.append(at + len(placeholder))
        growths.append(growths[-1] + len(replacement) - len(placeholder))
    pieces.append(text[ends[-1] :])
    return "".join(pieces), lambda position: position + growths[bisect_right(ends, position) - 1]


def answer_labels(
    input_ids: torch.Tensor, offsets: torch.Tensor, answer_spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return (N,) labels: ``input_ids`` for tokens with a character of an answer, -100 otherwise.

    >>> ids, offsets = torch.tensor([5, 6, 7]), torch.tensor([[0, 2], [2, 5], [5, 6]])
    >>> answer_labels(ids, offsets, [(3, 6)]).tolist()
    [-100, 6, 7]
    """
    start, end = offsets[:, 0], offsets[:, 1]
    trained = torch.zeros_like(input_ids, dtype=torch.bool)
    for first, last in answer_spans:
        trained |= (start < last) & (end > first) & (end > start)
    return torch.where(trained, input_ids, torch.full_like(input_ids, -100))
