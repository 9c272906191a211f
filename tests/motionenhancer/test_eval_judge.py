"""When an answer is right, in every corner of both benchmarks' rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionenhancer.data.question import Question
from motionenhancer.evaluation.benchmarks import BENCHMARKS, Rules, render_prompt
from motionenhancer.evaluation.judge import first_letter, lone_letter, names_option, same_text

REFUSALS = ["I cannot tell.", "Sorry, this video shows nothing.", "Unable to determine", "N/A"]


@pytest.mark.parametrize(
    ("output", "published", "lone"),
    [
        ("B", "B", "B"),
        (" B\n", "B", "B"),
        ("B.", "B", "B"),
        ("B. It moves right", "B", "B"),
        ("B: It moves right", "B", "B"),
        ("B\nIt moves right", "B", "B"),
        # brackets
        ("(B)", "B", "B"),
        ("( B )", "B", "B"),
        ("B)", "B", "B"),
        ("B) It moves right", "B", "B"),
        ("(B) It moves right (I think)", "B", "B"),
        ("The answer is (B).", "B", "B"),
        ("(b)", "b", "B"),
        ("[B]", "[", "B"),
        ("**B**", "*", "B"),
        # lower case
        ("b", "b", "B"),
        ("b.", "b", "B"),
        # several letters
        ("A or B", "A", ""),
        ("A, B", "A", ""),
        ("B B", "B", "B"),
        ("(A) or (B)", "A", ""),
        ("AB", "A", ""),
        # a letter in a word, or a word that is a letter
        ("Because it moves", "B", ""),
        ("Apple", "A", ""),
        ("A man walks", "A", ""),
        ("The answer is B", "T", "B"),
        ("Answer: B", "A", "B"),
        ("I'd say it's D", "I", "D"),
        # the option's text
        ("It moves right", "I", ""),
        ("moves right", "m", ""),
        # nothing
        ("", "", ""),
        ("   \n", "", ""),
        (")", "", ""),
        ("()", "", ""),
        ("(", "", ""),
        ("B2", "B", ""),
        # a capital A before a word that is no noun
        ("Option A is correct.", "O", "A"),
        ("The answer is A because he turns.", "T", "A"),
        ("A is the best choice", "A", "A"),
        ("A because he turns", "A", "A"),
        ("A clearly shows it", "A", "A"),
        ("A best describes it", "A", "A"),
        ("It is A, not an ant", "I", "A"),
        ("A\nhe turns", "A", "A"),
        ("A: a man walks", "A", "A"),
        ("I choose A as he turns", "I", "A"),
        ("A can be seen", "A", "A"),
        ("A matches the video", "A", "A"),
        ("Option A shows a man", "O", "A"),
        ("option A man walks", "o", "A"),
        ("Letter A man", "L", "A"),
        # an article
        ("A can falls", "A", ""),
        ("A slowly moving car", "A", ""),
        ("A best friend waves", "A", ""),
        ("A must-see", "A", ""),
        ("A 10-year-old boy runs", "A", ""),
        ("A while later he turns", "A", ""),
        ("It is B. A man walks.", "I", "B"),
        # two letters are named
        ("Option B is wrong, option A is right.", "O", ""),
        ("Option B is wrong, option a is right.", "O", ""),
        ("A is wrong, so B", "A", ""),
        ("Not A but B", "N", ""),
        ("A rather than B", "A", ""),
        ("Option A is right, A man walks", "O", "A"),
        ("OPTION C", "O", "C"),
        ("option b", "o", "B"),
    ],
)
def test_letters(output: str, published: str, lone: str) -> None:
    assert first_letter(output) == published
    assert lone_letter(output) == lone


class Watched(str):
    """A text that counts the characters of its slices."""

    copied = 0

    def __getitem__(self, key: Any) -> Watched:
        piece = Watched(super().__getitem__(key))
        Watched.copied += len(piece)
        return piece

    def strip(self, chars: str | None = None) -> Watched:
        return Watched(super().strip(chars))


@pytest.mark.parametrize("part", ["B ", "A man ", "A because ", "(b) ", "option B ", "A"])
def test_a_long_answer_is_read_in_time_in_proportion_to_its_length(part: str) -> None:
    """One slice of the answer at each letter would take minutes for ten thousand letters."""
    answer = Watched(part * 2000)
    Watched.copied = 0
    assert lone_letter(answer) in ("A", "B", "")
    assert Watched.copied <= 4 * len(answer)


@pytest.mark.parametrize("output", ["", "  ", *REFUSALS])
def test_a_refused_answer_is_wrong(output: str) -> None:
    letter = Question("u", "v", "Which?\nA. a\nB. b", "B", ("MR",))
    option = Question("v#0", "v", "Which?", "It turns", ("AS",), ("It turns", "It stays"))
    for rules in (Rules(), Rules("lone", "published")):
        assert not BENCHMARKS["motionbench"].right(letter, output, rules)
        assert not BENCHMARKS["favor"].right(option, output, rules)


OPTIONS = ["It moves left", "It moves left and then right", "It stays still", "It grows"]


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("It moves left", "It moves left", True),
        ("it MOVES left.", "It moves left", True),
        ("The answer is: It moves left", "It moves left", True),
        ("It moves left and then right", "It moves left", False),
        ("IT MOVES LEFT AND THEN RIGHT", "It moves left", False),
        ("It moves left. Not: it moves left and then right", "It moves left", False),
        ("It moves left and then right", "It moves left and then right", True),
        ("It moves left", "It moves left and then right", False),
        # another option that does not contain the answer does no harm
        ("It moves left, or it grows", "It moves left", True),
        ("It moves  left", "It moves left", False),
        ("moves left", "It moves left", False),
        ("A", "It moves left", False),
        ("", "It moves left", False),
        ("It moves lefty", "It moves left", True),
    ],
)
def test_option_texts(output: str, answer: str, right: bool) -> None:
    assert names_option(output, answer, OPTIONS) is right
    assert names_option(output, answer, OPTIONS, match_case=True) is right


def test_case_where_one_option_contains_another() -> None:
    options = ["Jump", "High jump", "JUMP"]
    assert not names_option("high jump", "Jump", options)
    assert names_option("high jump", "Jump", options, match_case=True)
    assert names_option("jump", "Jump", options), "an option that differs in case only is no longer one"


@given(
    answer=st.text("ab ", min_size=1, max_size=4),
    options=st.lists(st.text("abAB ", max_size=6), max_size=4),
    output=st.text("abAB .", max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_option_rule_in_other_words(answer: str, options: list[str], output: str) -> None:
    """An answer is right if the output names it and names no longer option that contains it."""
    folded = output.swapcase().casefold()
    longer = {o.casefold() for o in options if len(o) > len(answer) and o.casefold().count(answer.casefold())}
    struck = [o for o in longer if folded.find(o) >= 0]
    assert names_option(output, answer, options) == (folded.find(answer.casefold()) >= 0 and not struck)


def test_toy_rule() -> None:
    assert same_text(" the Red  circle", "The red circle.")
    assert not same_text("the red circle moves", "The red circle.")
    assert not same_text("", "The red circle.")


def test_prompts_are_the_published_ones() -> None:
    question = Question("v#0", "v", "What is first?", "a", ("AS",), ("It's up", 'a "b"'))
    favor = render_prompt(BENCHMARKS["favor"].prompt, question)
    assert favor.startswith(
        "Carefully watch the video and pay attention to temporal dynamics in this video, "
    )
    assert favor.endswith(
        "the question.\nWhat is first?\nYou can only response with the answer among "
        """["It's up", 'a "b"']"""
    )
    letter = Question("u", "v", "Which?\nA. {options}\nB. {x}", "B", ("MR",))
    asked = render_prompt(BENCHMARKS["motionbench"].prompt, letter)
    assert asked.startswith(letter.text + "\n"), "braces in a question are left alone"


@pytest.mark.parametrize("bad", [{"letter": "first"}, {"option": "exact"}])
def test_unknown_rules_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="rule must be one of"):
        Rules(**bad)
