"""Render a conversation with the processor's own chat template, and find its messages and answers in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from motionenhancer.data.sample import Sample

__all__ = ["Rendered", "answer_labels", "expand", "render"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    text: what the chat template gave.
    text_spans: for each message the (start, end) in ``text`` of its text parts, blank ones left out.
    answer_spans: (start, end) of the content of each assistant message that is to be learnt, and of the token
        that ends it.
    """

    text: str
    text_spans: tuple[tuple[tuple[int, int], ...], ...]
    answer_spans: tuple[tuple[int, int], ...]


def render(processor: Any, sample: Sample) -> Rendered:
    """Render ``sample`` with the chat template of ``processor``.

    An answer begins where the prompt for it ends, or with its own text where the template prompts with other
    white space, and reaches to the last character that is not white space before the next message; both are
    found by rendering the conversation up to there. A text part lies where the rendering changes when the
    part does.

    Raises:
        ValueError: no messages, no assistant message, the first message is the assistant's, or a template
            that renders earlier messages differently once later ones are added.
    """
    messages = sample.messages
    if not messages:
        raise ValueError(f"sample {sample.id!r} has no messages")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"sample {sample.id!r} has no assistant message to train on")
    if roles[0] == "assistant":
        raise ValueError(f"sample {sample.id!r} begins with an assistant message: nothing asks for it")
    text = _template(processor, messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("loss") is not False]
    if not answers:
        raise ValueError(f"sample {sample.id!r} leaves every answer out of the loss")
    ends = {i: len(_prefix(processor, sample, text, i)) for j in answers for i in (j, j + 1)}
    text_spans = _text_spans(processor, messages, text)
    answer_spans: list[tuple[int, int]] = []
    for i in answers:
        prompt = _template(processor, messages[:i], True)
        if text.startswith(prompt):
            first = len(prompt)
        elif text_spans[i]:
            # Some templates prompt for an answer with other white space than they show one with.
            first = text_spans[i][0][0]
        else:
            raise _changed(sample, i)
        answer_spans.append((first, first + len(text[first : ends[i + 1]].rstrip())))
    return Rendered(text, text_spans, tuple(answer_spans))


def _template(processor: Any, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)


def _prefix(processor: Any, sample: Sample, text: str, count: int) -> str:
    part = _template(processor, sample.messages[:count]) if count else ""
    if not text.startswith(part):
        raise _changed(sample, count)
    return part


def _changed(sample: Sample, count: int) -> ValueError:
    return ValueError(
        f"sample {sample.id!r}: the chat template renders the first {count} messages differently once "
        "later ones are added, so the answers cannot be located"
    )


def _text_spans(
    processor: Any, messages: Sequence[dict[str, Any]], text: str
) -> tuple[tuple[tuple[int, int], ...], ...]:
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
    found = []
    for i, message in enumerate(messages):
        spans = []
        for j, part in enumerate(message["content"]):
            if part["type"] != "text" or not part["text"].strip():
                continue
            content = [*message["content"][:j], {**part, "text": mark}, *message["content"][j + 1 :]]
            other = _template(processor, [*messages[:i], {**message, "content": content}, *messages[i + 1 :]])
            start = other.find(mark)
            if start < 0:
                raise ValueError(f"the chat template does not show text part {j} of message {i}")
            spans.append((start, len(text) - (len(other) - start - len(mark))))
        found.append(tuple(spans))
    return tuple(found)


def expand(text: str, replacements: Sequence[tuple[str, str]]) -> tuple[str, Callable[[int], int]]:
    """Replace placeholders, in order.

    Args:
        text: rendered conversation.
        replacements: (placeholder, what stands for it), in order of appearance; each is searched after the
            last.

    Returns:
        text with the replacements, and a function from a position in the old text to that in the new one.

    Raises:
        ValueError: a placeholder is not there.

    >>> text, moved = expand("a <v> b", [("<v>", "<v><v>")])
    >>> text, moved(5), moved(6)
    ('a <v><v> b', 8, 9)
    """
    pieces: list[str] = []
    ends, growths = [0], [0]
    for placeholder, replacement in replacements:
        at = text.find(placeholder, ends[-1])
        if at < 0:
            raise ValueError(f"the rendered conversation has too few {placeholder!r}")
        pieces += [text[ends[-1] : at], replacement]
        ends.append(at + len(placeholder))
        growths.append(growths[-1] + len(replacement) - len(placeholder))
    pieces.append(text[ends[-1] :])
    return "".join(pieces), lambda position: position + growths[bisect_right(ends, position) - 1]


def answer_labels(
    input_ids: torch.Tensor, offsets: torch.Tensor, answer_spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return (N,) labels: ``input_ids`` where a token has a character of an answer, -100 elsewhere.

    >>> ids, offsets = torch.tensor([5, 6, 7]), torch.tensor([[0, 2], [2, 5], [5, 6]])
    >>> answer_labels(ids, offsets, [(3, 6)]).tolist()
    [-100, 6, 7]
    """
    start, end = offsets[:, 0], offsets[:, 1]
    trained = torch.zeros_like(input_ids, dtype=torch.bool)
    for first, last in answer_spans:
        trained |= (start < last) & (end > first) & (end > start)
    return torch.where(trained, input_ids, torch.full_like(input_ids, -100))
