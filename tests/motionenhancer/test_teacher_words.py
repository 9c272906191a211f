"""Which pieces of a text are words, under every kind of tokenizer that a teacher may have."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from motionenhancer.teachers.folder import tokenize
from motionenhancer.toy.tokenizers import qwen_tokenizer, t5_tokenizer

WORDS = ["red", "square", "moves"]


def word_piece() -> Any:
    vocab = {
        piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *WORDS, "##s"])
    }
    tokenizer = BertTokenizerFast(vocab=vocab)
    # A prompt's tokens come first in a teacher's tokenizer.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 2)]
    )
    return tokenizer


def undeclared(model: Any) -> Any:
    """A tokenizer whose model has an unknown piece of which the tokenizer's own settings say nothing."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def word_level() -> Any:
    return undeclared(models.WordLevel({w: i for i, w in enumerate(["<pad>", "?", *WORDS])}, unk_token="?"))


def unigram() -> Any:
    return undeclared(models.Unigram([("<pad>", 0.0), ("?", 0.0), *((w, -1.0) for w in WORDS)], unk_id=1))


def bpe_that_drops() -> Any:
    """A BPE without bytes and without an unknown piece: it drops what it does not know."""
    vocab = {c: i for i, c in enumerate(["<pad>", *sorted(set("redsquaremoves"))])}
    return undeclared(models.BPE(vocab, []))


@pytest.mark.parametrize("make", [t5_tokenizer, word_piece, word_level, unigram, bpe_that_drops])
def test_only_known_pieces_are_words(make: Any) -> None:
    tokenizer, text = make(), "red 方块 square 🏃 moves"
    _, encoding = tokenize(tokenizer, text, 48)
    spoken = encoding.words
    assert "".join(text[slice(*encoding.spans[i])] for i in spoken).replace(" ", "") == "redsquaremoves"
    assert encoding.unknown == 3
    assert encoding.truncated == 0
    _, nothing = tokenize(tokenizer, "方块 🏃", 48)
    assert nothing.words == ()
    assert nothing.unknown == 3
    _, all_known = tokenize(tokenizer, "red square moves", 48)
    assert all_known.unknown == 0


def test_a_byte_level_tokenizer_without_an_unknown_piece_knows_every_text() -> None:
    text = "red 方块 🏃"
    _, encoding = tokenize(qwen_tokenizer(), text, 48)
    assert [token for i, token in enumerate(encoding.tokens) if i not in encoding.words] == ["Ġ", "Ġ"]
    assert encoding.unknown == 0
    _, other = tokenize(qwen_tokenizer(), "red 移动 🏃", 48)
    assert other.tokens != encoding.tokens


def test_what_was_cut_off_is_not_counted_as_unknown_too() -> None:
    _, encoding = tokenize(t5_tokenizer(), "red 方 " + "red " * 60 + "块块", 16)
    assert encoding.truncated > 0
    assert encoding.unknown == 1


def test_what_says_nothing_is_not_unknown() -> None:
    _, encoding = tokenize(t5_tokenizer(), "red\u200b square\u00ad \n moves", 48)
    assert encoding.unknown == 0
