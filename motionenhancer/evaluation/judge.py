"""When an answer is right: each benchmark's published rule, and a stricter or fuller reading beside it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

__all__ = ["first_letter", "lone_letter", "names_option", "same_text"]

_ALONE = re.compile(r"(?<![A-Za-z0-9'’])([A-Za-z])(?![A-Za-z0-9'’])")
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

    A single lower-case letter counts only as the whole answer or in brackets: "a" is also a word. A capital
    "A" followed by a lower-case word is taken for the article.

    >>> [lone_letter(s) for s in ("(b)", "b.", "The answer is B.", "B) a dog")]
    ['B', 'B', 'B', 'B']
    >>> [lone_letter(s) for s in ("Because", "A or C", "A man walks")]
    ['', '', '']
    """
    text = output.strip()
    whole = text.strip(string.punctuation + " ")
    if len(whole) == 1 and whole.upper() in _LETTERS:
        return whole.upper()
    found = set()
    for match in _ALONE.finditer(text):
        letter, before, after = match.group(1), text[: match.start()], text[match.end() :]
        bracketed = before.endswith("(") and after.startswith(")")
        article = letter == "A" and re.match(r"\s+[a-z]", after) and not re.match(r"\s+(and|or)\b", after)
        if letter.upper() in _LETTERS and (bracketed or (letter.isupper() and not article)):
            found.add(letter.upper())
    return found.pop() if len(found) == 1 else ""


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
