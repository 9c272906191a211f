"""Render a conversation with the processor's own chat template, and find its messages and answers in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from motionenhancer.data.sample import Sample

__all__ = ["Rendered", "answer_labels", "expand", "render"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    text: what the chat template gave.
    message_spans: (start, end) in ``text`` of each message, its role markers included.
    answer_spans: (start, end) of each assistant message's content and the token that ends it.
    """

    text: str
    message_spans: tuple[tuple[int, int], ...]
    answer_spans: tuple[tuple[int, int], ...]


def render(processor: Any, sample: Sample) -> Rendered:
    """Render ``sample`` with the chat template of ``processor``.

    Messages are located by rendering the conversation up to each of them: an answer begins where the prompt
    for it ends, and reaches to the last character that is not white space before the next message.

    Raises
    ------
    ValueError: no messages, no assistant message, the first message is the assistant's, or a template that
        renders earlier messages differently once later ones are added.
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
    message_spans: list[tuple[int, int]] = []
    answer_spans: list[tuple[int, int]] = []
    begin = 0
    for i, role in enumerate(roles):
        end = len(_prefix(processor, sample, text, i + 1))
        message_spans.append((begin, end))
        if role == "assistant":
            first = len(_prefix(processor, sample, text, i, prompt=True))
            last = first + len(text[first:end].rstrip())
            answer_spans.append((first, last))
        begin = end
    return Rendered(text, tuple(message_spans), tuple(answer_spans))


def _template(processor: Any, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)


def _prefix(processor: Any, sample: Sample, text: str, count: int, *, prompt: bool = False) -> str:
    part = _template(processor, sample.messages[:count], prompt)
    if not text.startswith(part):
        raise ValueError(
            f"sample {sample.id!r}: the chat template renders the first {count} messages differently once "
            "later ones are added, so the answers cannot be located"
        )
    return part


def expand(
    text: str, replacements: Sequence[tuple[str, str]], spans: Sequence[tuple[int, int]]
) -> tuple[str, list]:
    """Replace placeholders, in order, and move ``spans`` along.

    Parameters
    ----------
    text: rendered conversation.
    replacements: (placeholder, what stands for it), in order of appearance; each is searched after the last.
    spans: character ranges in ``text`` that do not cut a placeholder.

    Returns
    -------
    text with the replacements, and the spans in it.

    Raises
    ------
    ValueError: a placeholder is not there.

    >>> expand("a <v> b", [("<v>", "<v><v>")], [(0, 5), (6, 7)])
    ('a <v><v> b', [(0, 8), (9, 10)])
    """
    pieces: list[str] = []
    moves: list[tuple[int, int]] = []
    cursor = grown = 0
    for placeholder, replacement in replacements:
        at = text.find(placeholder, cursor)
        if at < 0:
            raise ValueError(f"the rendered conversation has too few {placeholder!r}")
        pieces += [text[cursor:at], replacement]
        cursor = at + len(placeholder)
        grown += len(replacement) - len(placeholder)
        moves.append((cursor, grown))
    pieces.append(text[cursor:])

    def moved(position: int) -> int:
        shift = 0
        for end, total in moves:
            if end > position:
                break
            shift = total
        return position + shift

    return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]


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
