"""Word mapping against a character-by-character definition, over generated texts and tokenisations."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from students_support import TEXTS, clip, dialogue

from motionenhancer.data.sample import Sample, prompt_text
from motionenhancer.students import map_words, student_family
from motionenhancer.toy.models import make_student
from motionenhancer.toy.tokenizers import t5_tokenizer

WORDS = st.sampled_from(["the", "red", "circle", "left", "moves", "é", "動く", "👩‍🚀", "a", "naïve", "left,"])
SPACES = st.sampled_from([" ", "  ", "\n", "\t ", "\u3000"])


@st.composite
def message(draw: Any) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=6))
    return "".join(draw(SPACES) + word if i else word for i, word in enumerate(words))


@st.composite
def cuts(draw: Any, text: str) -> list[tuple[int, int]]:
    """Cut a text into tokens; some characters become several tokens, as bytes do, and some none."""
    points = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=12))})
    spans: list[tuple[int, int]] = []
    for start, end in itertools.pairwise(points):
        copies = draw(st.sampled_from([1, 1, 1, 1, 0, 3])) if end - start == 1 else 1
        spans += [(start, end)] * copies
    return spans


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    messages = draw(st.lists(message(), min_size=1, max_size=4))
    chosen = draw(st.lists(st.booleans(), min_size=len(messages), max_size=len(messages)))
    if not any(chosen):
        chosen[0] = True
    prompt, segments = "", []
    for i, (text, used) in enumerate(zip(messages, chosen, strict=True)):
        if used:
            prompt += " " if prompt else ""
            segments.append((len(prompt), len(prompt) + len(text), i))
            prompt += text
    rendered, bounds, origin = "", [], {}
    for i, text in enumerate(messages):
        rendered += draw(st.sampled_from(["<s>", "the red left\n", ""])) + "U: "
        for j, character in enumerate(text):
            origin[i, j] = len(rendered) + j
            del character
        bounds.append([(len(rendered), len(rendered) + len(text))])
        rendered += text + draw(st.sampled_from(["</s>\n", "\n", " left "]))
    return {
        "prompt": prompt,
        "segments": segments,
        "text": rendered,
        "message_spans": bounds,
        "origin": origin,
        "spans": draw(cuts(prompt)),
        "offsets": draw(cuts(rendered)),
    }


def expected_pairs(case: dict[str, Any]) -> set[tuple[int, int]]:
    """Pairs of a token and a row that share a character, taken from the construction without any search."""
    where = {}
    for start, end, index in case["segments"]:
        for i in range(start, end):
            if not case["prompt"][i].isspace():
                where[i] = case["origin"][index, i - start]
    pairs = set()
    for token, (start, end) in enumerate(case["spans"]):
        characters = {where[i] for i in range(start, end) if i in where}
        for row, (first, last) in enumerate(case["offsets"]):
            if characters & set(range(first, last)):
                pairs.add((token, row))
    return pairs


@settings(max_examples=300, deadline=None)
@given(conversations())
def test_pairs_are_those_that_share_a_character(case: dict[str, Any]) -> None:
    found = map_words(
        case["spans"],
        case["prompt"],
        case["segments"],
        case["text"],
        torch.tensor(case["offsets"], dtype=torch.int64).reshape(-1, 2),
        message_spans=case["message_spans"],
    )
    pairs = list(zip(found.row_tokens, found.rows, strict=True))
    assert pairs == sorted(expected_pairs(case))
    tokens = {token for token, _ in pairs}
    assert found.dropped == [t for t in range(len(case["spans"])) if t not in tokens]
    assert found.count == len(case["spans"])
    assert found.mapped == len(tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(message(), min_size=1, max_size=3), st.data())
def test_templates_may_trim_and_fold_white_space(messages: list[str], data: Any) -> None:
    """All other characters are found, whatever the template does with white space."""
    prompt, segments = "", []
    for i, text in enumerate(messages):
        padded = data.draw(SPACES) + text + data.draw(SPACES)
        segments.append((len(prompt), len(prompt) + len(padded), i))
        prompt += padded
    rendered, bounds = "", []
    for text in messages:
        start = len(rendered)
        rendered += "|" + re.sub(r"\s+", " ", text) + "|"
        bounds.append([(start, len(rendered))])
    characters = [(i, i + 1) for i in range(len(prompt))]
    places = [(i, i + 1) for i in range(len(rendered))]
    found = map_words(characters, prompt, segments, rendered, places, message_spans=bounds)
    solid = [i for i, c in enumerate(prompt) if not c.isspace()]
    assert found.row_tokens == solid
    assert [rendered[row] for row in found.rows] == [prompt[i] for i in solid]


@example("left", "the left", "left right")
@given(st.text(min_size=1), st.text(), st.text())
def test_any_text_maps_onto_itself(text: str, before: str, after: str) -> None:
    rendered = before + text + after
    spans = [(i, i + 1) for i in range(len(text))]
    offsets = [(i, i + 1) for i in range(len(rendered))]
    bounds = [[(len(before), len(before) + len(text))]]
    found = map_words(spans, text, [(0, len(text), 0)], rendered, offsets, message_spans=bounds)
    assert found.rows == [len(before) + i for i, c in enumerate(text) if not c.isspace()]


def test_repeated_words_are_found_in_their_own_message() -> None:
    text = "U: left or left? A: left"
    bounds = [[(3, 15)], [(20, 24)]]
    answer = map_words(
        [(0, 4)], "left", [(0, 4, 1)], text, [(3, 7), (11, 15), (20, 24)], message_spans=bounds
    )
    assert answer.rows == [2]
    first = map_words([(0, 4)], "left", [(0, 4, 1)], text, [(3, 7), (11, 15), (20, 24)])
    assert first.rows == [0]


def test_messages_in_order_without_bounds() -> None:
    text = "U: left or left? A: left"
    prompt, segments = "left or left? left", [(0, 13, 0), (14, 18, 1)]
    spans = [(0, 4), (8, 12), (14, 18)]
    found = map_words(spans, prompt, segments, text, [(3, 7), (11, 15), (20, 24)])
    assert found.rows == [0, 1, 2]


def test_two_parts_of_one_message() -> None:
    text = "red <video> red"
    found = map_words(
        [(0, 3), (4, 7)],
        "red red",
        [(0, 3, 0), (4, 7, 0)],
        text,
        [(0, 3), (12, 15)],
        message_spans=[[(0, 3), (12, 15)]],
    )
    assert (found.rows, found.row_tokens) == ([0, 1], [0, 1])


def test_truncated_student_drops_and_counts() -> None:
    spans = [(0, 3), (4, 8), (9, 14)]
    found = map_words(spans, "red ball moves", [(0, 14, 0)], "red ball moves", [(0, 3), (3, 6)])
    assert (found.rows, found.row_tokens, found.dropped, found.mapped) == ([0, 1], [0, 1], [2], 2)


def test_text_the_student_never_saw() -> None:
    found = map_words([(0, 3)], "red", [(0, 3, 0)], "blue", [(0, 4)])
    assert (found.rows, found.dropped, found.count) == ([], [0], 1)


def test_merged_and_split_tokens() -> None:
    text = "redball"
    merged = map_words([(0, 3), (3, 7)], text, [(0, 7, 0)], text, [(0, 7)])
    assert (merged.rows, merged.row_tokens) == ([0, 0], [0, 1])
    split = map_words([(0, 7)], text, [(0, 7, 0)], text, [(0, 2), (2, 5), (5, 7)])
    assert (split.rows, split.row_tokens) == ([0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(0, 9)], "red", [(0, 3, 0)]), r"spans must lie within the 3 characters of prompt, got \(0, 9\)"),
        (([(2, 1)], "red", [(0, 3, 0)]), "spans must lie"),
        (([(0, 3)], "red", [(0, 4, 0)]), "segments must lie"),
        (([(0, 3)], "red", [(0, 3, 1)]), "segments must name one of 1 messages, got 1"),
        (([(0, 3)], "red", [(0, 1, 0), (1, 3, 0)]), "more parts of message 0 than its 1"),
    ],
)
def test_bad_input(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_words(*arguments, "red", [(0, 3)], message_spans=[[(0, 3)]])


@pytest.mark.parametrize("source", ["both", "question", "answer"])
@pytest.mark.parametrize(
    "turns",
    [
        *TEXTS,
        ("What moves left?", "It moves left.", "And what moves right?", "It moves right, it moves left."),
        ("Où va l'étoile naïve?", "動く 👩‍🚀 — ¿left?"),
        ("user", "a"),
    ],
)
def test_real_tokenizers(source: Any, turns: tuple[str, ...]) -> None:
    """T5 pieces on one side, byte-level pieces in a rendered chat on the other: every shown word is found."""
    _, processor = make_student(layers=1)
    sample: Sample = dialogue(*turns)
    encoded = student_family("qwen2_5_vl").encode(processor, sample, [clip(2, 16, 16)])
    prompt, segments = prompt_text(sample, source)
    teacher = t5_tokenizer()(prompt, return_offsets_mapping=True)
    spans = [span for span in teacher["offset_mapping"] if span[1] > span[0]]
    layout = encoded.layout
    found = map_words(
        spans, prompt, segments, layout.text, layout.offsets, message_spans=layout.message_spans
    )
    assert found.dropped == [i for i, (a, b) in enumerate(spans) if prompt[a:b].isspace()]
    roles = {"question": "user", "answer": "assistant"}
    for token, row in zip(found.row_tokens, found.rows, strict=True):
        word, piece = prompt[slice(*spans[token])].strip(), layout.text[slice(*layout.offsets[row].tolist())]
        assert word in piece or piece.strip() in word or set(word) & set(piece)
        at = int(layout.offsets[row, 1]) - 1
        index = next(i for i, parts in enumerate(layout.message_spans) if parts[0][0] <= at < parts[-1][1])
        assert source == "both" or sample.messages[index]["role"] == roles[source]
