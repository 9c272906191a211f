"""Selection of the tokens that a prior keeps: motion-salient token identification and its variants.

Source: MotionEnhancer (CVPR 2026, arXiv 2606.06853), eq. 14; figure 3 has negative scores of whole words.
"""

from __future__ import annotations

import torch

from mekernels import VideoTokens, select_tokens, token_motion_scores

from ..teachers.protocol import TextEncoding

SCORES = ("raw", "standardized")
UNITS = ("piece", "word")


def choose_tokens(
    text_attention: torch.Tensor,
    prompt: TextEncoding,
    video: VideoTokens,
    ratio: float,
    scores: str = "raw",
    unit: str = "piece",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the tokens of a text, and keep the best tokens among those that are words or parts of words.

    Args:
        text_attention: (T, S) rows of the real tokens over the video.
        prompt: the text, T real tokens.
        video: the grid of the S video tokens.
        ratio: share of the pieces or words to keep.
        scores: "raw": mean attention plus its mean change between frames. "standardized": each of the two
            is first standardized to mean 0 and population deviation 1 over the pieces or words; a constant
            one adds 0.
        unit: "piece": every piece has its own score. "word": the pieces of a word share the mean of their
            scores, and are kept or dropped together.

    Returns:
        (T,) scores of all real tokens, and the ascending indices of the kept ones, int64 on the CPU.
    """
    both = token_motion_scores(text_attention, video)
    level = text_attention.mean(-1, dtype=both.dtype)
    terms = torch.stack([both]) if scores == "raw" else torch.stack([level, both - level])
    eligible = torch.tensor(prompt.words, device=terms.device)
    pieces = word_numbers(prompt) if unit == "word" else range(len(eligible))
    units = torch.tensor(list(pieces), device=terms.device)
    counts = torch.bincount(units)
    each = terms.new_zeros(len(terms), len(counts)).index_add(1, units, terms[:, eligible]) / counts
    if unit == "word":
        terms[:, eligible] = each[:, units]
    if scores == "standardized":
        mean, deviation = each.mean(1, keepdim=True), each.std(1, correction=0, keepdim=True)
        constant = each.amax(1, keepdim=True) == each.amin(1, keepdim=True)
        terms, each = (torch.where(constant, 0.0, (one - mean) / deviation) for one in (terms, each))
    kept = select_tokens(each.sum(0), ratio)
    return terms.sum(0), eligible[torch.isin(units, kept)].cpu()


def word_numbers(prompt: TextEncoding) -> list[int]:
    """The word number of each token, ascending from 0, without bare spaces and unknown pieces.

    A word is a run of letters, digits and marks. Each piece of punctuation is a word of its own.
    """
    numbers: list[int] = []
    end = -1
    for token in prompt.words:
        first, last = prompt.spans[token]
        piece = prompt.text[first:last]
        start = first + len(piece) - len(piece.lstrip())
        in_word = any(character.isalnum() for character in piece)
        last_number = numbers[-1] if numbers else -1
        numbers.append(last_number if in_word and start == end else last_number + 1)
        end = last if in_word else -1
    return numbers
