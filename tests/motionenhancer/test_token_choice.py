"""Which tokens of a text are kept, against a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mekernels import VideoTokens
from motionenhancer.priors.token_choice import choose_tokens, word_numbers
from motionenhancer.teachers.protocol import TextEncoding

VIDEO = VideoTokens(frames=3, height=2, width=2)


def encoded(text: str, pieces: list[str], words: list[int] | None = None) -> TextEncoding:
    spans, at = [], 0
    for piece in pieces:
        at = text.index(piece, at)
        spans.append((at, at + len(piece)))
        at += len(piece)
    chosen = tuple(range(len(pieces)) if words is None else words)
    return TextEncoding(torch.zeros(1, 1, 1), tuple(pieces), tuple(spans), text, chosen)


def terms(rows: np.ndarray) -> np.ndarray:
    """(2, T): mean over the frames, mean absolute change between them."""
    frames = rows.reshape(len(rows), 3, 4).mean(-1)
    return np.stack([frames.mean(1), np.abs(np.diff(frames)).mean(1)])


@pytest.mark.parametrize(
    ("text", "pieces", "numbers"),
    [
        ("red square moves", ["red", "square", "moves"], [0, 1, 2]),
        ("red square moves", ["red", " squ", "are", " moves"], [0, 1, 1, 2]),
        ("upwards, left.", ["up", "wards", ",", " left", "."], [0, 0, 1, 2, 3]),
        ("the 2nd.", ["the", " 2", "nd", "."], [0, 1, 1, 2]),
        ("...", [".", ".", "."], [0, 1, 2]),
        ("don't", ["don", "'", "t"], [0, 1, 2]),
    ],
)
def test_pieces_of_one_word_have_its_number(text: str, pieces: list[str], numbers: list[int]) -> None:
    assert word_numbers(encoded(text, pieces)) == numbers


def test_a_piece_that_is_left_out_parts_no_other_words() -> None:
    prompt = encoded("a bc", ["a", " ", "b", "c"], words=[0, 2, 3])
    assert word_numbers(prompt) == [0, 1, 1]


@pytest.mark.parametrize("scores", ["raw", "standardized"])
@pytest.mark.parametrize("unit", ["piece", "word"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_and_kept_tokens(scores: str, unit: str, seed: int) -> None:
    prompt = encoded(
        "red squares move up", ["red", " squ", "ar", "es", " move", " ", "up"], [0, 1, 2, 3, 4, 6]
    )
    rows = np.random.default_rng(seed).random((7, 12))
    found, kept = choose_tokens(torch.from_numpy(rows), prompt, VIDEO, 0.5, scores, unit)
    groups = [[0], [1, 2, 3], [4], [6]] if unit == "word" else [[0], [1], [2], [3], [4], [6]]
    each = np.stack([terms(rows)[:, group].mean(1) for group in groups], 1)
    if scores == "standardized":
        each = (each - each.mean(1, keepdims=True)) / each.std(1, keepdims=True)
    each = each.sum(0)
    best = np.argsort(-each, kind="stable")[: int(0.5 * len(groups) + 0.5)]
    assert kept.tolist() == sorted(token for index in best for token in groups[index])
    for group, score in zip(groups, each, strict=True):
        np.testing.assert_allclose(found[group], np.full(len(group), score), rtol=1e-12, atol=1e-12)


def test_a_constant_term_adds_nothing() -> None:
    prompt = encoded("a b", ["a", " b"])
    still = torch.tensor([[1.0] * 12, [2.0] * 12], dtype=torch.float64)
    found, kept = choose_tokens(still, prompt, VIDEO, 0.5, "standardized")
    assert found.tolist() == [-1.0, 1.0]
    assert kept.tolist() == [1]
