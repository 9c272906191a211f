"""When an answer is right: each benchmark's published rule, and a second rule beside it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

#: Words that neither are a noun nor stand between an article and one: a capital A before them is an option.
_NO_NOUN = (
    r"is isn was wasn are were has have had does do did can(?=\sbe) could will would shall should may might "
    r"must and or nor but so yet for because since as if when while(?!\s(?:later|ago|after)) although though "
    r"than then that which who whom whose where why how what of in on at to from by with without about into "
    r"over under after before instead only also too not rather(?=\sthan) therefore thus hence here there "
    r"please i you he she it we they me him her us them his its my your our their the a an this these those "
    r"both either neither seems appears looks fits matches describes shows depicts represents explains "
    r"captures reflects states says suggests indicates corresponds applies happens occurs follows aligns "
    r"agrees contains includes mentions"
)
#: A capital A before a lower-case word or a number that can be a noun or stand before one, on the same line.
_ARTICLE = (
    r"A(?=[ \t]+(?:[a-z]|\d+-?[A-Za-z]))"
    rf"(?![ \t]+(?:(?:[a-z]{{1,20}}ly|best)[ \t]+)?(?:{'|'.join(_NO_NOUN.split())})(?!-?[a-z]))"
)
#: A letter that stands alone: named an option, capital, or lower-case in brackets; an article has no group.
_NAMED = re.compile(
    r"(?<![A-Za-z0-9'’])(?:"
    r"(?i:option[ \t]{1,8}(?P<option>[A-F])|(?:choice|letter)[ \t]{1,8}(?P<choice>(?-i:[A-F])))"
    rf"|{_ARTICLE}|(?P<capital>[A-F])|(?<=\()(?P<bracketed>[a-f])(?=\))"
    r")(?![A-Za-z0-9'’])"
)
_LETTERS = "ABCDEF"


def first_letter(output: str) -> str:
    """Read an option letter as MotionBench's authors do (``polish_answer`` of their repository).

    What comes before the first closing bracket counts, of that what follows its first opening bracket, and
    of that the first character. So ``"(B)"``, ``"B. left"`` and ``"I choose (B)"`` are B. The rule is blunt:
    case is kept, ``"Because"`` is B, ``"A or C"`` is A, and ``"The answer is B"`` is T.

    >>> [first_letter(s) for s in ("B", " (B) left", "B) left", "b", "Because", "It is B", "")]
    ['B', 'B', 'B', 'b', 'B', 'I', '']
    """
    text = output.partition(")")[0].strip()
    if "(" in text:
        text = text.split("(")[1].strip()
    return text[:1]


def lone_letter(output: str) -> str:
    """Read the one option letter A to F that stands alone; empty where there is none, or more than one.

    A lone lower-case letter counts only as the whole answer or in brackets: "a" is also a word. A capital
    "A" is taken for the article where a noun can follow it: before a lower-case word that is no verb,
    conjunction, preposition, pronoun or the like. After "option", "choice" or "letter" it is none, and after
    "option" a lower-case letter counts too. Takes time in proportion to the output's length.

    >>> [lone_letter(s) for s in ("(b)", "b.", "The answer is B.", "B) a dog")]
    ['B', 'B', 'B', 'B']
    >>> [lone_letter(s) for s in ("Because", "A or C", "A man walks")]
    ['', '', '']
    >>> [lone_letter(s) for s in ("Option A is correct.", "It is A because he turns.", "Not A, but B.")]
    ['A', 'A', '']
    """
    whole = output.strip(string.punctuation + string.whitespace)
    if len(whole) == 1 and whole.upper() in _LETTERS:
        return whole.upper()
    found: set[str] = set()
    for match in _NAMED.finditer(output):
        if match.lastgroup is not None:
            found.add(match[match.lastgroup].upper())
        if len(found) > 1:
            return ""
    return found.pop() if found else ""


def names_option(output: str, answer: str, options: Sequence[str], *, match_case: bool = False) -> bool:
    """Tell whether an output names the right option, as FAVOR-Bench's authors do (``inference_qa_qwen.py``).

    The answer's text must appear in the output, and no longer option that contains it may. Case never matters
    in the output. Their code lets it matter where it asks which options contain the answer; ``match_case``
    does the same, so that "high jump" then counts for "Jump" although "High jump" is an option.

    >>> options = ["He jumps", "He jumps twice", "He sits"]
    >>> names_option("HE JUMPS.", "He jumps", options), names_option("he jumps twice", "He jumps", options)
    (True, False)
    """
    said, wanted = output.lower(), answer.lower()
    if wanted not in said:
        return False
    for option in options:
        low = option.lower()
        longer = option != answer and answer in option if match_case else low != wanted and wanted in low
        if longer and low in said:
            return False
    return True


def same_text(output: str, answer: str) -> bool:
    """Whether two texts agree but for case, spacing and punctuation; the toy world's rule.

    >>> same_text("the red circle", "The red  circle.")
    True
    """
    table = str.maketrans("", "", string.punctuation)
    said, wanted = (text.translate(table).lower().split() for text in (output, answer))
    return said == wanted
